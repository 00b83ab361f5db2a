"""Pictures of a cache: its signals in a few numbers, and responses token by token."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from typing_extensions import Doc

from adpa.data.cache.choice import are_versions, choose, made_from
from adpa.data.cache.files import write_file
from adpa.data.cache.format import check_cache
from adpa.data.cache.locations import check_outside, check_writable_file
from adpa.data.cache.responses import ResponseSet, read_response_sets
from adpa.data.cache.selection import ScoredSet, select_scored
from adpa.data.cache.tokenizers import read_tokenizer
from adpa.data.inspection import InspectedResponse, inspect_responses
from adpa.data.reward_accuracy import SetRewards, set_rewards
from adpa.data.summary import SignalSummary, summarize
from adpa.errors import CacheError, OptionError
from adpa.pipeline.inspected_runs import InspectedRun, inspected_run, read_run
from adpa.pipeline.option_checks import check_counts, check_not_empty, takes_options
from adpa.pipeline.options import CacheArgument, Group, ResponseSetOption, ScoringOption, TrustRemoteCodeOption
from adpa.pipeline.terminal.inspection_html import render_page
from adpa.progress import progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class InspectReport:
    """The result of ``inspect_cache``.

    Attributes:
        summaries: one for each response set and scoring.
        data: the data of the one set that is shown, and when it was made; empty where several are summarised.
        left_out: a line about each response set that no scoring has whole.
        responses: the responses, token by token; none where several response sets or scorings fit.
        html: the page that was written.
        rewards: one for each chosen and rejected set of the same data with each scoring that has both and a reference;
            at least one of the two is among the summaries.
        runs: the runs that were named.
    """

    summaries: list[SignalSummary]
    data: str
    left_out: list[str]
    responses: list[InspectedResponse]
    html: str | None
    rewards: list[SetRewards]
    runs: list[InspectedRun] = field(default_factory=list)


@takes_options
def inspect_cache(
    cache: CacheArgument,
    response_set: ResponseSetOption = None,
    scoring: ScoringOption = None,
    example: Annotated[
        str | None, Doc("Example to show (the beginning of its id); default: the first ones."), Group.SIGNALS
    ] = None,
    count: Annotated[int, Doc("Responses to show, unless --example names one."), Group.SIGNALS] = 3,
    html: Annotated[
        Path | None, Doc("HTML page to write, with the teacher's top alternatives at every token."), Group.SIGNALS
    ] = None,
    trust_remote_code: TrustRemoteCodeOption = False,
    run: Annotated[
        list[Path] | None,
        Doc("Directory of an adpa distill, whose settings and curves the page shows too; repeatable."),
        Group.SIGNALS,
    ] = None,
) -> InspectReport:
    """Show what a cache says: its signals in a few numbers, and responses token by token.

    Every response set is summarised with every scoring that has its signals, the newest first. Where only one is left
    of each, some of its responses are shown too, each token in the colour of its advantage (without a reference, of its
    log-probability). With --response-set chosen, that is the newest version of the chosen responses.

    Raises:
        AdpaError: a problem with the arguments or the cache that the caller can solve.
    """
    check_counts({"--count": count})
    check_not_empty({"--example": example, "--response-set": response_set, "--scoring": scoring})
    if html is not None:
        check_writable_file("--html", html)
        if str(html.absolute()).startswith(("/dev/", "/proc/")):  # a page takes the place of what is there
            raise OptionError(f"--html {html}: no place for a page", "name a file")
        check_cache(cache)
        check_outside("--html", html, cache)
    records = {directory: read_run(directory) for directory in run or []}
    scored, left_out = select_scored(cache, scoring, response_set)
    among, one_needed = len(scored), example is not None or html is not None
    if among > 1 and (one_needed or (response_set is not None and are_versions(scored))):
        scored = [choose(scored)]
    data = made_from(scored[0], among) if len(scored) == 1 else ""
    rows = _rows(scored[0].responses, example, count) if len(scored) == 1 else []
    rewards = set_rewards(scored, list(read_response_sets(cache)))
    for one in rewards:
        if (warning := one.warning()) is not None:
            logger.warning("%s: %s", one.of(), warning)
    summaries = [_summarize(one) for one in scored]
    responses = []
    if rows:
        tokenizer = read_tokenizer(cache, scored[0].responses.info.tokenizer, trust_remote_code)
        responses = inspect_responses(scored[0], rows, tokenizer)
    runs = [inspected_run(directory, record) for directory, record in records.items()]
    if html is not None:
        curves = [_draw(record) for record in records.values()]
        record = scored[0].responses.record
        page = render_page(summaries[0], record, rewards, responses, list(zip(runs, curves, strict=True)))
        write_file(html, page.encode())
    return InspectReport(summaries, data, left_out, responses, None if html is None else str(html), rewards, runs)


def _draw(record: Mapping[str, Any]) -> str:
    """The curves of a run; empty if it has no log yet."""
    if not record.get("losses"):
        return ""
    from adpa.pipeline.training.curves import draw_curves  # imports matplotlib

    return draw_curves(record)


def _rows(responses: ResponseSet, example: str | None, count: int) -> Sequence[int]:
    """The rows of the responses to show."""
    if example is None:
        return range(min(count, len(responses)))
    example_ids = responses.table["example_id"].to_pylist()
    matching = {name for name in example_ids if name.startswith(example)}
    chosen = {example} & matching or matching
    if len(chosen) != 1:
        several = sorted(chosen or set(example_ids))
        listing = ", ".join(several[:5]) + (f" and {len(several) - 5} more" if len(several) > 5 else "")
        problem = f"{len(chosen)} examples fit: {listing}" if chosen else f"no such example; found {listing}"
        raise CacheError(f"--example {example}: {problem}", "name one of them")
    return [row for row, name in enumerate(example_ids) if name in chosen]


def _summarize(scored: ScoredSet) -> SignalSummary:
    with progress(f"reading the signals of {scored.responses.info.name} responses", len(scored.responses)) as advance:
        return summarize(scored, advance)
