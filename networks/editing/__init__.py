"""What the command-line tools for network files do: merging, resizing, converting, reporting. No adapter imports it."""
