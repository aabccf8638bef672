"""What the meter must know of an answer, from its canonical form: for every dialect that is read into it anyway."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from extproc import form
from extproc.dialects.dialect import StreamReader
from extproc.records import Answer, Piece, Usage


def piece_reader(reader: StreamReader) -> Callable[[bytes], Piece]:
    """`Dialect.piece_reader` for one stream."""
    return lambda data: piece(reader.read(data))


def piece(events: Sequence[form.StreamEvent]) -> Piece:
    """All that these events say, as one piece."""
    texts: list[str] = []
    started: list[int] = []
    finished: list[int] = []
    usage: Usage | None = None
    service_tier: str | None = None
    done = error = unseen = False
    for event in events:
        match event:
            case form.TextDelta() | form.ThinkingDelta() | form.RefusalDelta():
                texts.append(event.text)
                started.append(event.choice)
            case form.ToolArguments():
                texts.append(event.json)
                unseen = True
            case form.ToolStarted():
                texts.append(event.name)
                started.append(event.choice)
                unseen = True
            case form.Unseen():
                texts.append(event.text)
                unseen = True
            case form.Finished():
                finished.append(event.choice)
            case form.Started() | form.Used():
                usage = event.usage or usage
                service_tier = event.service_tier or service_tier
            case form.Failed():
                error = True
            case form.Done():
                done = True
    return Piece(
        texts=tuple(filter(None, texts)),
        usage=usage,
        started=tuple(started),
        finished=tuple(finished),
        done=done,
        error=error,
        unseen=unseen,
        service_tier=service_tier,
    )


def answer(whole: form.Answer) -> Answer:
    """The same of a whole answer."""
    texts = [text for choice in whole.choices for part in choice.parts for text in _texts(part)]
    return Answer((*texts, *whole.unseen), whole.usage, whole.service_tier)


def _texts(part: form.Part) -> tuple[str, ...]:
    match part:
        case form.Text() | form.Thinking() | form.Refusal():
            return (part.text,) if part.text else ()
        case form.ToolCall():
            return part.name, part.arguments
    return ()
