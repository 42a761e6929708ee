"""`hookctl run`: a stack of editors from a file on a pipeline."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import hookctl
from hookctl.cli import common, scheduled
from hookctl.cli.draw import Drawing, images
from hookctl.cli.hooks import add_hook, attach_hooks, check_hooks, takes_image
from hookctl.cli.inverting import (
    check_fits,
    check_image,
    drawn_prompts,
    from_image,
    images_of,
    program_for,
    read_image,
    takes_inside,
)
from hookctl.cli.known import editors_by_name, inversions_by_name, programs_by_name
from hookctl.cli.lora import add_lora, check_loras, put_on, said
from hookctl.cli.models import find_model
from hookctl.cli.quiet import quiet
from hookctl.cli.results import SHOWN_WORDS, Results, say
from hookctl.cli.stacks import PRESETS, first_comment, prompts_of, stack_file
from hookctl.errors import InputError, UnsupportedError
from hookctl.inspect import table
from hookctl.preset import (
    ImageSpec,
    Preset,
    RawStack,
    check_early,
    load_preset,
    read_stack,
)

if TYPE_CHECKING:
    from PIL.Image import Image

T = TypeVar("T")

_ONLY_HOOKS, _ONLY_PROMPTS = (RawStack(Path(name), {}, "") for name in ("hook", "schedule"))
_TEXT = """
Run a stack of editors from a TOML file. What the file does not say is said here, and what is said
here goes before the file. Draws the plain images and the edited ones from the same noise. Some
stacks take an image (--image): with an [inversion] table it is edited, and described by --prompt;
with a [program] table the prompt is drawn round it, or in its place. A prompt may change on the
way: [from:to:0.4] after 0.4 of the steps, [from:to:10] after 10 of them, [a|b] at every step.

writes to --out (default: out/run-STACK):
  grid.png          source, plain re-prompt, edited, and the maps of the words that changed
  plain-*.png       each prompt without the stack
  edited-*.png      each prompt under the stack
  influence-*.png   of a collaboration: which model is trusted where, step by step
  report.txt        which editor touched which site at which steps, by which plan
  run.json          what was run: versions, seed, arguments, the stack's hash
"""
_EXAMPLES = """
hookctl run recolour                         # a stack that comes with hookctl (--list)
hookctl run stack.toml --model ./sd15 --lora style.safetensors:0.8 --prompt "a cat" --edit "a dog"
hookctl run --model ./sd15 --hook ip-adapter_sd15.bin:0.6 --image face.png --prompt "a photo"
hookctl run --model shapes --prompt "a red [circle:square:0.3]"        # no stack, a schedule
hookctl run inverted_edit --image out/run-recolour/plain-0.png         # edits an image
"""


def add(commands: Any) -> None:
    command = common.add_command(
        commands, "run", main, "run a stack of editors from a file", _TEXT, _EXAMPLES
    )
    command.add_argument(
        "stack", nargs="?", help="a TOML file, or the name of a stack that comes with hookctl"
    )
    command.add_argument("--list", action="store_true", help="list the stacks that come along")
    command.add_argument("--model", metavar="MODEL", help=common.MODEL_HELP)
    add_lora(command)
    add_hook(command)
    command.add_argument(
        "--image",
        type=Path,
        metavar="FILE",
        help="of your own, for a stack that takes one: PNG, JPEG ... of the size that is drawn",
    )
    common.add_setting(command, "prompt")
    common.add_setting(command, "edit", action="append")
    command.add_argument(
        "--words",
        type=common.words,
        metavar="A,B",
        help="whose maps to show (default: the words that changed, or that an editor is given)",
    )
    common.add_out(command, "out/run-STACK")
    common.add_drawing(command, images=True)
    common.add_machine(command)
    common.add_progress(command)


def main(options: Any) -> None:
    if options.list:
        stacks = sorted(PRESETS.glob("*.toml"))
        print(table([(s.stem, first_comment(s)) for s in stacks], ("stack", "what it does")))
        return
    # Weights, or a prompt that changes on the way, and no stack.
    if options.stack is None and options.hook:
        raw = _ONLY_HOOKS
    elif options.stack is None and scheduled.is_said(options):
        raw = _ONLY_PROMPTS
    else:
        raw = read_stack(stack_file(options.stack))
    _check(raw, options)
    with common.out_folder(options.out, "run", raw.path.stem) as out:
        _run(raw, out, options)


@quiet()
def _run(raw: RawStack, out: Path, options: Any) -> None:
    from hookctl.cli.loading import load_pipeline

    preset = Preset((), path=raw.path)
    if raw not in (_ONLY_HOOKS, _ONLY_PROMPTS):
        known = (editors_by_name(), inversions_by_name(), programs_by_name())
        preset = load_preset(raw.path, *known)
    written = prompts_of(options, raw, preset.takes_prompts)
    said_drawing = Drawing.of(options, preset.run)
    schedule = scheduled.schedule_of(written, said_drawing.negative)
    prompts = scheduled.begun(written)
    drawing = scheduled.begun_drawing(said_drawing)
    hooks = options.hook or preset.hooks
    image = read_image(preset, options.image, drawing, allowed=bool(hooks))
    # First: what others ask in a step, they ask of its prompts.
    editors = [*filter(None, [schedule]), *preset.editors(prompts, image)]
    loras = options.lora or preset.loras
    model = _model(options, raw)
    pipe = load_pipeline(model, options.device, options.dtype)
    put_on(pipe, loras)
    attached = attach_hooks(pipe, hooks, prompts, image)
    if image is not None and not (preset.takes_image or takes_image(attached)):
        check_image(False, options.image, preset.path)
    editors += [one.editor for one in attached]
    progress = common.wants_progress(options)
    prompts_drawn = drawn_prompts(preset, prompts)
    changes = schedule is not None and not schedule.neutral()
    wanted = options.words or not changes
    maps = _maps(pipe, prompts_drawn, options.words, preset) if wanted else []
    times: dict[str, float] = {}
    draw_plain: Callable[[str], list[Image]] = partial(
        images, pipe, drawing, prompts_drawn, progress=progress
    )
    draw, program = draw_plain, None
    if image is not None and preset.inversion is not None:
        given = (pipe, preset, image, drawing, prompts, progress)
        draw = _timed(times, "inversion", from_image, *given)
        draw_plain = draw
    elif image is not None and preset.program is not None:
        program = program_for(pipe, preset, image, drawing, prompts)
        maps = maps if getattr(program, "takes_editors", True) else []
        inside = [*editors, *maps] if takes_inside(program) else []
        draw = images_of(program, progress, inside)
    elif image is not None and preset.takes_image:
        check_fits(pipe, image, drawing)
    # Control comes first: it refuses what can't be done before anything is drawn.
    around = [] if takes_inside(program) else [*editors, *maps]
    with hookctl.control(pipe, *around) as session:
        edited = _timed(times, "edited", draw, "edited")
    plain = _timed(times, "plain", draw_plain, "plain")
    own = getattr(program, "session", None)
    session = own if own is not None and not around else session
    sessions = [session] if own in (None, session) else [session, own]
    readers = [one for one in (*maps, *editors) if isinstance(one, hookctl.Maps)]
    words = [word for one in readers for word in one.words] or session.maps.words
    titles = [f"alpha {alpha:g}" for alpha in getattr(program, "alphas", ())]
    Results(prompts_drawn, drawing.images, plain, edited, sessions, words, image, titles).save(out)
    common.write_json(
        out / "run.json",
        {
            "stack": None if raw in (_ONLY_HOOKS, _ONLY_PROMPTS) else str(preset.path),
            "stack_sha256": preset.sha256,
            "editors": [{"recipe": s.recipe, **s.arguments} for s in preset.specs],
            "inversion": _said(preset.inversion),
            "program": _said(preset.program),
            "loras": said(loras),
            "hooks": [one.data() for one in attached],
            "image": options.image,
            "model": model,
            "pipeline": type(pipe).__name__,
            "device": str(pipe.device),
            "dtype": str(pipe.dtype).removeprefix("torch."),
            "prompts": written,
            **said_drawing.data(),
            "seconds": times,
            "versions": common.versions(),
        },
    )
    print("\n".join(line for one in attached for line in one.lines()), end="\n" * bool(attached))
    say(out, sessions, preset, times)


# -- before ----------------------------------------------------------------------------------------


def _check(raw: RawStack, options: Any) -> None:
    """Check all that needs neither torch nor the model: they take seconds."""
    known = check_early(raw.data, raw.path)
    prompts = prompts_of(options, raw, known.takes(raw.data, "prompts"))
    common.check_words(options.words, scheduled.begun(prompts))
    if known.knows_all(raw.data):
        allowed = bool(options.hook or raw.hooks)
        check_image(known.takes_image(raw.data), options.image, raw.path, allowed=allowed)
    find_model(_model(options, raw))
    check_hooks(options.hook or raw.hooks)
    check_loras(options.lora or raw.loras)


def _model(options: Any, raw: RawStack) -> str:
    model: str | None = options.model or raw.model
    if model is None:
        raise InputError(f"which model? Give --model, or model = in {raw.path}")
    return model


def _maps(
    pipe: Any, prompts: Sequence[str], wanted: Sequence[str] | None, preset: Preset
) -> list[hookctl.Maps]:
    """The editor that reads the maps to be shown, if the pipeline has words."""
    if wanted:
        return [hookctl.Maps(*wanted)]
    from hookctl.address.text import TextLayout
    from hookctl.address.words import changed_words

    try:
        layout = TextLayout(pipe)
    except UnsupportedError:
        return []
    tokens = [layout.read(prompt).streams[0][1] for prompt in prompts]
    if len(prompts) == 1:
        return [hookctl.Maps(*_telling([w.text for w in tokens[0].words], preset))]
    found: list[str] = []
    for target in tokens[1:]:
        edits = changed_words(tokens[0], target)
        found += [target.words[i].text for edit in edits for i in edit.target][:SHOWN_WORDS]
    return [hookctl.Maps(*dict.fromkeys(found))] if found else []


# Words that name nothing in an image.
_LITTLE = frozenset(
    "a an the of on in at by to and or with without is are its left right above below over under "
    "beside between behind front near next from".split()
)


def _telling(words: Sequence[str], preset: Preset) -> list[str]:
    """Of the words of one prompt those that its editors are about, else the longest.

    An editor's own words come first, then the last word of each text of a region that no other
    text of it has: "circle" of "a red circle on white".
    """
    found: list[str] = []
    for spec in preset.specs:
        given = spec.arguments.get("words")
        found += given if isinstance(given, list) else []
        texts = spec.arguments.get("texts")
        if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
            found += _nouns([text.split() for text in texts])
    given = [word for word in dict.fromkeys(found) if word in words]
    content = [word for word in dict.fromkeys(words) if word.lower() not in _LITTLE]
    longest = sorted(content, key=len, reverse=True)[:SHOWN_WORDS]
    return given[:SHOWN_WORDS] or [word for word in content if word in longest]


def _nouns(texts: Sequence[Sequence[str]]) -> list[str]:
    """Of each text the last word that it alone has."""
    alone = []
    for i, text in enumerate(texts):
        others = {word for j, other in enumerate(texts) if j != i for word in other}
        own = [word for word in text if word not in others and word.lower() not in _LITTLE]
        alone += own[-1:]
    return alone


# -- after -----------------------------------------------------------------------------------------


def _timed(times: dict[str, float], name: str, make: Callable[..., T], *given: Any) -> T:
    """make(*given), whose seconds go to `times`."""
    started = time.perf_counter()
    made = make(*given)
    times[name] = round(time.perf_counter() - started, 3)
    return made


def _said(spec: ImageSpec | None) -> dict[str, Any] | None:
    """What the file says of an inversion or a program."""
    return None if spec is None else {"recipe": spec.recipe, **spec.arguments}
