"""The report of a data set as lines and as one page: no other file, no script, no address of the network."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from textwrap import shorten

from PIL import Image

from library.data.images import UnreadableImage, read_image
from library.preparation.check import KINDS, BucketLine, CheckReport, Finding

_THUMBNAIL_PX = 128
_TAGS_SHOWN = 100
_NAMES_SHOWN = 20
_TAG_LETTERS = 60
_STYLE = """
body { font: 15px/1.4 sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; color: #222; background: #fff }
table { border-collapse: collapse } td, th { padding: .15em .8em .15em 0; text-align: left; vertical-align: top }
td.number { text-align: right } .pictures { display: flex; flex-wrap: wrap; gap: .8em }
figure { margin: 0; width: 140px; font-size: 12px; overflow-wrap: anywhere } img { max-width: 128px; display: block }
.group { border: 1px solid #ccc; padding: .5em; display: flex; gap: .8em } .stays { font-weight: bold }
"""


def report_lines(report: CheckReport) -> list[str]:
    """The report in words."""
    lines = [line for dataset in report.datasets for line in dataset.lines()[:1]]
    for buckets in report.buckets:
        lines += [f"  bucket {_bucket_words(bucket)}" for bucket in buckets]
    lines.append(f"{report.images} images")
    for kind, (title, advice) in KINDS.items():
        found = report.of_kind(kind)
        if found:
            lines.append(f"{title}: {len(found)}. {advice}")
            lines += [f"  {finding.path}{_colon(finding.detail)}" for finding in found[:_NAMES_SHOWN]]
            lines += [f"  and {len(found) - _NAMES_SHOWN} more"] if len(found) > _NAMES_SHOWN else []
    once = sum(count == 1 for _, count in report.tags)
    shown = ", ".join(f"{shorten(tag, _TAG_LETTERS)} {count}" for tag, count in report.tags[:_NAMES_SHOWN])
    lines.append(f"{len(report.tags)} different tags, {once} of them once; the most frequent: {shown or 'none'}")
    return lines


def report_page(report: CheckReport, most_pictures: int) -> str:
    """The report as HTML with at most ``most_pictures`` thumbnails for each kind of finding."""
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8"><title>Data set report</title>',
            f"<style>{_STYLE}</style></head><body>",
            f"<h1>Data set report</h1><p>{report.images} images</p>",
            *_summary(report),
            *_buckets(report),
            *(line for kind in KINDS for line in _section(report, kind, most_pictures)),
            *_tags(report),
            "</body></html>",
        ]
    )


def make_thumbnail(path: str) -> bytes | None:
    """A small JPEG of an image file, or None if it cannot be decoded."""
    try:
        picture = Image.fromarray(read_image(path))
    except UnreadableImage:
        return None
    picture.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=75)
    return buffer.getvalue()


def _colon(detail: str) -> str:
    return f": {detail}" if detail else ""


def _bucket_words(bucket: BucketLine) -> str:
    width, height = bucket.size
    return (
        f"{width}x{height}: {bucket.images} images, {bucket.cut_share:.1%} cut away, scaled x{bucket.enlargement:.2f}"
    )


def _summary(report: CheckReport) -> Iterator[str]:
    yield "<table>"
    for kind, (title, _) in KINDS.items():
        count = len(report.of_kind(kind))
        name = f'<a href="#{kind}">{escape(title)}</a>' if count else escape(title)
        yield f'<tr><td>{name}</td><td class="number">{count}</td></tr>'
    yield "</table>"


def _buckets(report: CheckReport) -> Iterator[str]:
    for dataset, buckets in zip(report.datasets, report.buckets, strict=True):
        yield f"<h2>Buckets</h2><p>{escape(dataset.lines()[0])}</p><ul>"
        for subset in dataset.subsets:
            yield f"<li>{escape(subset.name)}: {subset.images} images x {subset.repeats} repeats</li>"
        yield "</ul><table><tr><th>size</th><th>images</th><th>cut away</th><th>scaled</th></tr>"
        for bucket in buckets:
            cells = (bucket.images, f"{bucket.cut_share:.1%}", f"x{bucket.enlargement:.2f}")
            rest = "".join(f'<td class="number">{cell}</td>' for cell in cells)
            yield f"<tr><td>{bucket.size[0]}x{bucket.size[1]}</td>{rest}</tr>"
        yield "</table>"


def _section(report: CheckReport, kind: str, most_pictures: int) -> Iterator[str]:
    found = report.of_kind(kind)
    if not found:
        return
    title, advice = KINDS[kind]
    yield f'<h2 id="{kind}">{escape(title)} ({len(found)})</h2><p>{escape(advice)}</p><div class="pictures">'
    shown = found[:most_pictures]
    for position, finding in enumerate(shown):
        opens = finding.group is not None and (position == 0 or shown[position - 1].group != finding.group)
        closes = finding.group is not None and (
            position + 1 == len(shown) or shown[position + 1].group != finding.group
        )
        yield ('<div class="group">' if opens else "") + _figure(finding) + ("</div>" if closes else "")
    yield "</div>"
    yield from _names(found[most_pictures:])


def _figure(finding: Finding) -> str:
    data = make_thumbnail(finding.path)
    name = escape(Path(finding.path).name)
    image = ""
    if data is not None:
        image = f'<img alt="{name}" src="data:image/jpeg;base64,{base64.b64encode(data).decode()}">'
    style = ' class="stays"' if finding.stays else ""
    caption = f'<span title="{escape(finding.path)}">{name}</span><br>{escape(finding.detail)}'
    return f"<figure{style}>{image}<figcaption>{caption}</figcaption></figure>"


def _names(rest: Sequence[Finding]) -> Iterator[str]:
    if rest:
        yield f"<p>{len(rest)} more, without pictures:</p><ul>"
        yield from (f"<li>{escape(finding.path)}{escape(_colon(finding.detail))}</li>" for finding in rest)
        yield "</ul>"


def _tags(report: CheckReport) -> Iterator[str]:
    once = sum(count == 1 for _, count in report.tags)
    yield f"<h2>Tags</h2><p>{len(report.tags)} different ones, {once} of them on one image only.</p><table>"
    for tag, count in report.tags[:_TAGS_SHOWN]:
        yield f'<tr><td>{escape(shorten(tag, _TAG_LETTERS))}</td><td class="number">{count}</td></tr>'
    yield "</table>"
