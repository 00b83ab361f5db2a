"""Checks, without torch, the cache and the student of a run, as far as that does not need the weights."""

from collections.abc import Mapping, Sequence

from adpa.data.cache.format import check_cache
from adpa.data.cache.held_out_sets import held_out_ids
from adpa.data.cache.locations import Location
from adpa.data.cache.names import find_sets
from adpa.data.cache.responses import ResponseName, read_response_sets
from adpa.data.cache.selection import Need, named_scorings
from adpa.data.cache.shards import list_shards
from adpa.errors import CacheError
from adpa.pipeline.models.launcher import number_of_ranks
from adpa.pipeline.models.model_names import check_models
from adpa.pipeline.option_checks import check_not_empty
from adpa.pipeline.training.objectives import TermWeights


def find_needs(terms: Mapping[ResponseName, TermWeights]) -> dict[ResponseName, Need]:
    """The signals that the terms of an objective need of each response set."""
    return {name: Need(term.kl != 0 or term.advantage != 0, term.advantage != 0) for name, term in terms.items()}


def check_inputs(
    needs: Mapping[ResponseName, Need],
    student: str,
    cache: Location,
    scoring: str | None,
    response_sets: Sequence[str],
    held_out: str | None,
) -> None:
    """Checks what a run reads, before the long imports; the arguments are those of ``distill``.

    ``held_out`` is the second data set of ``--validation``, if it names one.

    Of several ranks one alone must not stop: there ``open_sources`` finds the same, on all of them.

    Raises:
        AdpaError: the cache lacks what every student needs, or the student is not there.
    """
    if number_of_ranks() > 1:
        return
    for name in response_sets:
        check_not_empty({"--response-set": name})
    _check_sets(cache, needs, response_sets, held_out)
    if any(need.signals for need in needs.values()):
        _check_scorings(cache, scoring, any(need.advantages for need in needs.values()))
    check_models({"--student": student})


def _check_sets(
    cache: Location, needs: Mapping[ResponseName, Need], response_sets: Sequence[str], held_out: str | None
) -> None:
    check_cache(cache)
    for name in needs:
        if not list_shards(cache / "responses", name):  # select reads the sets: here their names are enough
            fix = "run adpa precompute " + ("with --student" if name == "sampled" else f"--responses {name}")
            if name == "chosen" and list_shards(cache / "responses", "sampled"):
                fix = "run the same adpa precompute on preference pairs: its data has prompts alone"
            raise CacheError(f"{cache}: the cache has no {name} responses", fix)
    if response_sets or held_out:
        present = list(read_response_sets(cache))
        for text in response_sets:
            find_sets(text, present)
        if held_out:
            held_out_ids(held_out, present, response_sets)


def _check_scorings(cache: Location, scoring: str | None, advantages: bool) -> None:
    chosen = named_scorings(cache, scoring)
    if advantages and all(one.reference is None for one in chosen):
        reasons = "; ".join(f"scoring {one.id} has no reference, hence no advantages" for one in chosen)
        raise CacheError(
            f"{cache}: no scoring has the signals that are needed: {reasons}",
            "run adpa precompute with these responses, and with --reference for advantages",
        )
