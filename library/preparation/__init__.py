"""What is done to a folder of pictures before training: captions, tags, metadata, picture files, checks.

The files in ``tools/`` are the command lines; what they do stands here. Each piece of work goes on when a picture is
bad, and says at the end what it did and what it could not do (`library.preparation.outcome`).
"""
