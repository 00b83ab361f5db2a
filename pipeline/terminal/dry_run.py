"""Shows the plan of ``distill --dry-run`` in a terminal."""

from rich.console import Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

from adpa.data.pieces import visible
from adpa.pipeline.terminal.report import show_report
from adpa.pipeline.training.distill_plan import DistillPlan, MemoryEstimate, Piece, PlannedSequence, TokenCounts

TERMS = {"nll": "NLL", "kl": "KL", "advantage": "advantage"}
PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer's states",
    "activations": "activations",
    "loss_head": "loss head",
    "total": "in all",
}
OPEN, CLOSE = "⟦", "⟧"
TRAINED, PROMPT, LEFT_OUT = Style(bold=True, color="green"), Style(), Style(italic=True)


def show_plan(plan: DistillPlan) -> RenderableType:
    """What the run is, its tokens, its memory, and its first batch as text."""
    zeros = [name for name in ("steps_done", "validation_examples") if not getattr(plan, name)]
    leave_out = ["tokens", "memory", "first_batch", *zeros]
    shown: list[RenderableType] = [show_report("distill --dry-run", plan, leave_out)]
    if plan.tokens is None or plan.memory is None:
        shown.append(Text("\nNo step is left: the checkpoint is that of the last one."))
    else:
        shown += ["", _show_tokens(plan.tokens, plan.steps - plan.steps_done), "", *_show_memory(plan.memory)]
        shown += ["", *_show_batch(plan)]
    return Group(*shown, Text("\nNothing was trained or written."))


def _show_tokens(tokens: TokenCounts, steps: int) -> Table:
    table = Table("tokens", title=f"Tokens of {_count(steps, 'step')}", title_justify="left")
    for name in ("a step, mean", "a step, most", "in all"):
        table.add_column(name, justify="right")
    rows = {"trained": tokens.trained, "of prompts": tokens.prompts, "computed": tokens.computed}
    for name, count in rows.items():
        table.add_row(name, f"{count.mean:,.0f}", f"{count.most:,}", f"{count.total:,}")
    return table


def _show_memory(memory: MemoryEstimate) -> list[RenderableType]:
    table = Table("memory", title="Memory of a rank, estimated", title_justify="left")
    table.add_column("bytes", justify="right")
    for name, words in PARTS.items():
        if name == "total":
            table.add_section()
        value = getattr(memory, name)
        table.add_row(words, "unknown" if value is None else _bytes(value))
    micro_batch = f"{_count(memory.sequences, 'sequence')} ({memory.tokens:,} tokens)"
    text = (
        f"An estimate of the peak of a step, for the largest micro-batch: {micro_batch}. "
        f"{memory.device} has {_bytes(memory.device_memory)}. PyTorch itself and gaps between allocations come on top."
    )
    if memory.activations is None:
        text += " The activations cannot be estimated without this student's weights: they come on top, too."
    return [table, Text(text)]


def _show_batch(plan: DistillPlan) -> list[RenderableType]:
    shown = len({sequence.example for sequence in plan.first_batch})
    title = f"First micro-batch: {shown} of the {_count(plan.batch_size, 'example')} of step {plan.steps_done + 1:,}"
    legend = Text("The loss counts what is ")
    legend.append(f"{OPEN}bold and in brackets{CLOSE}", TRAINED).append("; the student only reads the rest.")
    parts: list[RenderableType] = [Text(title, Style(bold=True)), legend]
    for sequence in plan.first_batch:
        parts += ["", _heading(sequence), _text(sequence.pieces)]
    return parts


def _heading(sequence: PlannedSequence) -> Text:
    terms = " + ".join(
        TERMS[name] if weight == 1 else f"{weight:g} · {TERMS[name]}" for name, weight in sequence.terms.items()
    )
    counts = [f"{sequence.prompt_tokens:,} of prompt", f"{sequence.response_tokens:,} of response"]
    if sequence.trained_tokens != sequence.response_tokens:
        counts.append(f"{sequence.trained_tokens:,} trained")
    if sequence.padding:
        counts.append(f"{sequence.padding:,} of padding")
    name = f"example {sequence.example}, {sequence.response_set}"
    return Text(f"{name}: {terms or 'no term'}; tokens: {', '.join(counts)}", Style(bold=True))


def _text(pieces: list[Piece]) -> Text:
    text, trained = Text(overflow="fold"), False
    for piece in pieces:
        if piece.trained != trained:
            text.append(OPEN if piece.trained else CLOSE, TRAINED)
        trained = piece.trained
        style = TRAINED if trained else PROMPT
        if piece.left_out:
            text.append(f" … {_count(piece.left_out, 'token')} … ", style + LEFT_OUT)
        else:
            text.append(visible(piece.text, newline="↵\n"), style + Style(underline=piece.special))
    return text.append(CLOSE if trained else "", TRAINED)


def _bytes(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count / 1000:,.1f} kB"


def _count(number: int, name: str) -> str:
    return f"{number:,} {name}{'' if number == 1 else 's'}"
