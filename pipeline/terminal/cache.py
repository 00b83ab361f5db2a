"""Shows the reports of the ``adpa cache`` commands in a terminal."""

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.style import Style
from rich.text import Text

from adpa.data.pieces import visible
from adpa.pipeline.cache.gc import GarbageReport
from adpa.pipeline.cache.ls import CacheListing, ListedScoring, ListedSet
from adpa.pipeline.cache.pack import PackedFolder, PackReport
from adpa.pipeline.cache.verify import VerifyReport


def show_listing(listing: CacheListing) -> RenderableType:
    """Response sets and scorings with their origin, then everything else that takes space."""
    parts: list[RenderableType] = []
    for listed in listing.sets:
        prompts = f"{listed.prompt_tokens:,} tokens of prompts"
        size = f"{listed.rows:,} rows, {listed.tokens:,} tokens, {prompts}, {listed.bytes:,} bytes"
        parts += _block(f"response set {listed.name}", size, *_about_set(listed))
    for scored in listing.scorings:
        size = f"{scored.rows:,} rows, {scored.tokens:,} tokens, {scored.bytes:,} bytes"
        if scored.bytes_per_token is not None:
            size += f" ({scored.bytes_per_token:,.1f} a token)"
        parts += _block(f"scoring {scored.id}", f"{size} in {_count(scored.shards, 'file')}", *_about_scoring(scored))
    for samples in listing.samples:
        made = ", ".join(samples.sets) or "no response set was made of them"
        parts.append(_line(f"samples {samples.id}", f"{samples.rows:,} rows, {samples.bytes:,} bytes: {made}"))
    for tokenizer in listing.tokenizers:
        made = ", ".join(tokenizer.sets) or "no response set names it"
        parts.append(_line(f"tokenizer {tokenizer.digest}", f"{tokenizer.bytes:,} bytes: {made}"))
    if listing.undescribed.files:
        size = f"{_count(listing.undescribed.files, 'file')}, {listing.undescribed.bytes:,} bytes"
        parts.append(_line("signals without description", f"{size}; the same adpa precompute describes them"))
    for name, files in (("unfinished", listing.unfinished), ("damaged", listing.damaged)):
        if files.files:
            size = f"{_count(files.files, 'file')}, {files.bytes:,} bytes"
            parts.append(_line(name, f"{size}; adpa cache gc removes them"))
    parts += [_line("unknown", place) for place in listing.unknown]
    parts += [_line("unreadable", line) for line in listing.unreadable]
    parts.append(_line("total", f"{listing.total.files:,} files, {listing.total.bytes:,} bytes"))
    return Group(*parts)


def show_verification(report: VerifyReport) -> RenderableType:
    """Every fault, then the files that were checked and those that were not."""
    parts: list[RenderableType] = []
    for fault in report.faults:
        rows = f" ({fault.rows:,} rows)" if fault.rows is not None and fault.rows > 1 else ""
        parts += [_line(fault.place, fault.problem + rows), ""]
    parts += [_line("set aside", place) for place in report.set_aside]
    parts += [_line("not checked", place) for place in report.unknown]
    for name, count in (("unfinished", report.unfinished), ("set aside before", report.damaged)):
        if count:
            parts.append(_line("not checked", f"{count:,} {name}"))
    faults = _count(len(report.faults), "fault") if report.faults else "no fault"
    checked = f"in {_count(report.files, 'file')}, {_count(report.rows, 'row')}, {report.bytes:,} bytes"
    parts.append(_line(faults, checked))
    return Group(*parts)


def show_garbage(report: GarbageReport) -> RenderableType:
    """The garbage with reasons, and the files that stay for now."""
    parts = []
    for garbage in report.garbage:
        rows = "" if garbage.rows is None else f"{garbage.rows:,} of {garbage.rows + garbage.kept:,} rows, "
        parts.append(_line(garbage.place, f"{rows}{garbage.bytes:,} bytes: {garbage.reason}"))
    parts += [_line("stays", f"{place}: a run may be at work with it") for place in report.young]
    parts += [
        _line("stays", f"{place}: other files have rows of it; adpa cache pack first") for place in report.repeated
    ]
    done = "removed" if report.done else "can be removed; --yes does it"
    parts.append(_line(f"{report.bytes:,} bytes", done) if report.garbage else _line("no garbage", ""))
    return Group(*parts)


def show_packing(report: PackReport) -> RenderableType:
    """The folders whose files changed."""
    parts: list[RenderableType] = [_line(packed.folder, _about_packed(packed)) for packed in report.packed]
    if report.untouched:
        are = "is" if report.untouched == 1 else "are"
        parts.append(_line(_count(report.untouched, "folder"), f"{are} packed well"))
    return Group(*parts) if parts else _line("nothing to pack", "")


def _about_set(listed: ListedSet) -> list[str]:
    info, parts = listed.info, [f"from {listed.record.describe()}"] if listed.record else []
    if info.sampling is not None:
        how = info.sampling
        parts.append(
            f"sampled by the student {how.student[:8]}, temperature {how.temperature:g}, top-p {how.top_p:g}, "
            f"seed {how.seed}, {how.samples_per_prompt} to a prompt, at most {how.max_new_tokens:,} tokens, "
            f"{how.dtype}, {how.engine}" + (f", {how.describe_ends()}" if how.stops else "")
        )
    parts += info.rendering
    counts = {
        "truncated prompts": info.truncated_prompts,
        "truncated responses": info.truncated_responses,
        "dropped": info.dropped,
    }
    parts += [", ".join(f"{count:,} {name}" for name, count in counts.items() if count)]
    scored = [f"{rows:,} of {listed.rows:,} by {scoring}" for scoring, rows in listed.scored.items() if rows]
    parts.append("scored: " + ", ".join(scored) if scored else "not scored")
    return [part for part in parts if part]


def _about_scoring(scored: ListedScoring) -> list[str]:
    parts = [scored.scoring.settings]
    if (errors := scored.rounding) is not None:
        parts.append(
            f"rounding changes the KL of a token by {errors.kl:.1e} nats in the mean, {errors.largest_kl:.1e} at most, "
            f"its advantages by {errors.advantage:.1e}"
        )
    parts += [f"{scored.repeated:,} repeated rows; adpa cache pack drops them"] if scored.repeated else []
    parts += [f"{scored.unneeded:,} rows that no set needs; adpa cache gc removes them"] if scored.unneeded else []
    parts += [f"{scored.pending:,} rows wait for the reference"] if scored.pending else []
    return parts


def _about_packed(packed: PackedFolder) -> str:
    files = f"{_count(packed.files_before, 'file')} of {packed.bytes_before:,} bytes"
    now = f"{_count(packed.files, 'file')} of {packed.bytes:,} bytes"
    return f"{files} became {now}" + (f"; {_count(packed.repeated, 'repeated row')} dropped" if packed.repeated else "")


def _block(title: str, *lines: str) -> list[RenderableType]:
    """A bold line, then indented ones, then an empty one."""
    indented = [Padding.indent(Text(visible(line), overflow="fold"), 2) for line in lines]
    return [Text(visible(title), Style(bold=True), overflow="fold"), *indented, ""]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _line(title: str, text: str) -> Text:
    return Text.assemble((visible(title), Style(bold=True)), f" {visible(text)}".rstrip(), overflow="fold")
