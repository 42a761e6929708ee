"""A stack survives the way to TOML and back; what is wrong in a file is said with file and key."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
from PIL import Image

from hookctl.cli.models import EMBEDDED
from hookctl.cli.run import editors_by_name, inversions_by_name, programs_by_name
from hookctl.editor import Editor
from hookctl.errors import InputError
from hookctl.maps import Maps
from hookctl.preset import EditorSpec, HookSpec, LoraSpec, Preset, dump_preset, load_preset
from hookctl.preset.signature import Mismatch, convert, describe
from hookctl.recipes import PromptToPrompt

PRESETS = Path(__file__).parents[3] / "demos" / "presets"
PROMPTS = ["a red circle", "a blue circle"]


class Freedom(Editor):
    """An editor with an argument of every kind."""

    def __init__(
        self,
        strength: float,
        *,
        steps: int = 3,
        place: Literal["up", "down"] = "up",
        window: float | tuple[float, float] = 1.0,
        gains: Mapping[str, float] | None = None,
        words: str | Sequence[str] = (),
        test: Callable[[Any], bool] | None = None,
        on: bool = True,
    ) -> None:
        if strength > 9:
            raise InputError(f"strength={strength}; give at most 9")
        self.strength, self.steps, self.place, self.span = strength, steps, place, window
        self.gains, self.words, self.on = gains, words, on


class Turned:
    """An inversion: `pipe`, `image`, `prompt` and `steps` are the run's."""

    def __init__(
        self, pipe: Any, image: Any, prompt: str, *, steps: int = 50, guidance: float = 7.5
    ) -> None:
        if guidance <= 0:
            raise InputError(f"guidance={guidance}; give one above 0")
        self.given = (pipe, image, prompt, steps, guidance)


class Grown:
    """A program: besides, `guidance`, `negative`, `seed` and `size` are the run's."""

    def __init__(
        self,
        pipe: Any,
        image: Any,
        prompt: str,
        *,
        steps: int = 50,
        seed: int = 0,
        at: tuple[int, int] = (0, 0),
    ) -> None:
        self.given = (pipe, image, prompt, steps, seed, at)


class GrownMore(Grown):
    """What it doesn't name itself goes to its base."""

    def __init__(
        self, pipe: Any, image: Any, prompt: str, *, spread: float = 1.0, **options: Any
    ) -> None:
        super().__init__(pipe, image, prompt, **options)
        self.given += (spread,)


class Seen(Editor):
    """An editor that takes the run's image."""

    def __init__(self, image: Any, *, strength: float = 1.0) -> None:
        self.image, self.strength = image, strength


INVERSIONS: dict[str, type[Any]] = {"Turned": Turned}
PROGRAMS: dict[str, type[Any]] = {"Grown": Grown, "GrownMore": GrownMore}
ANY = '[[editor]]\nrecipe = "Maps"\nwords = ["x"]\n'

RECIPES: dict[str, type[Editor]] = {
    "PromptToPrompt": PromptToPrompt,
    "Freedom": Freedom,
    "Maps": Maps,
}


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def one(text: str) -> Path:
        path = tmp_path / "stack.toml"
        path.write_text(text, "utf-8")
        return path

    return one


Write = Callable[[str], Path]


def test_a_stack(write: Write) -> None:
    path = write(
        """
        model = "shapes"
        [run]
        edit = ["a blue circle"]
        steps = 5
        guidance = 4
        [[editor]]
        recipe = "Freedom"
        strength = 1
        window = [0.1, 0.5]
        gains = {red = 2, "red circle" = -1.5}
        [[editor]]
        recipe = "PromptToPrompt"
        self_replace = 0.25
        blend = [["red", "circle"], "circle"]
        [[editor]]
        recipe = "Maps"
        words = ["red", "circle"]
        """
    )
    preset = load_preset(path, RECIPES)
    assert preset.model == "shapes" and preset.takes_prompts and preset.path == path
    assert preset.run == {"edit": ["a blue circle"], "steps": 5, "guidance": 4.0}
    freedom, edit, maps = preset.editors(PROMPTS)
    assert isinstance(freedom, Freedom) and isinstance(edit, PromptToPrompt)
    assert isinstance(maps, Maps) and maps.words == ("red", "circle")
    assert freedom.strength == 1.0 and isinstance(freedom.strength, float)
    assert freedom.span == (0.1, 0.5) and freedom.gains == {"red": 2.0, "red circle": -1.5}
    assert edit.prompts == PROMPTS and edit.blend == [("red", "circle"), ("circle",)]
    assert preset.editors(PROMPTS)[0] is not freedom


def test_there_and_back(write: Write) -> None:
    arguments = {
        "strength": 0.1,
        "gains": {'réd "x"\n\\': 1e-7, "b": -3.0},
        "words": ["a", "ä\t"],
        "on": False,
        "window": (0.0, 0.3),
    }
    preset = Preset((EditorSpec("Freedom", Freedom, arguments),), {"prompt": "x", "seed": 3}, "m/n")
    back = load_preset(write(dump_preset(preset)), RECIPES)
    assert back.model == preset.model and back.run == preset.run
    assert [s.arguments for s in back.specs] == [arguments]
    assert dump_preset(back) == dump_preset(preset)


def test_loras(write: Write) -> None:
    """Their paths go from the file's folder on, unless they are whole."""
    text = '[[lora]]\npath = "a.safetensors"\nweight = 1\n[[lora]]\npath = "/b.safetensors"\n'
    path = write(text + ANY)
    preset = load_preset(path, RECIPES)
    assert preset.loras == (
        LoraSpec(path.parent / "a.safetensors", 1.0),
        LoraSpec(Path("/b.safetensors")),
    )
    assert load_preset(write(dump_preset(preset)), RECIPES).loras == preset.loras


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lora = 3\n", "lora = 3; write a table for each"),
        ("[[lora]]\nweight = 1\n", "[[lora]] 1: needs path (a text)"),
        ("[[lora]]\npath = 1\n", "[[lora]] 1 path = 1; give a text"),
        ('[[lora]]\npath = "a"\nscale = 1\n', "'scale' is not a key of a LoRA"),
    ],
)
def test_what_is_wrong_with_a_lora_is_said(write: Write, text: str, says: str) -> None:
    with pytest.raises(InputError) as caught:
        load_preset(write(text + ANY), RECIPES)
    assert says in str(caught.value)


def test_hooks(write: Write, tmp_path: Path) -> None:
    """What lies beside the file is meant, else a repository; they need no editor beside them."""
    text = '[[hook]]\npath = "a.bin"\nstrength = 1\nfaces = [["a.bin", "b.bin", "a"]]\n'
    text += '[[hook]]\npath = "o/n/b.bin"\n'
    (tmp_path / "a.bin").touch()
    path = write(text)
    preset, file = load_preset(path, RECIPES), str(path.parent / "a.bin")
    assert preset.specs == () and preset.hooks == (
        HookSpec(file, 1.0, {"faces": [[file, "b.bin", "a"]]}, f"{path}: [[hook]] 1"),
        HookSpec("o/n/b.bin", where=f"{path}: [[hook]] 2"),
    )
    assert load_preset(write(dump_preset(preset)), RECIPES).hooks == preset.hooks
    assert len(load_preset(write(text + ANY), RECIPES).specs) == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("hook = 3\n", "hook = 3; write a table for each"),
        ("[[hook]]\nstrength = 1\n", "[[hook]] 1: needs path (a text)"),
        ("[[hook]]\npath = 1\n", "[[hook]] 1 path = 1; give a text"),
        ('[[hook]]\npath = "a"\nstrength = "b"\n', "[[hook]] 1 strength = 'b'; give a number"),
    ],
)
def test_what_is_wrong_with_a_hook_is_said(write: Write, text: str, says: str) -> None:
    with pytest.raises(InputError) as caught:
        load_preset(write(text + ANY), RECIPES)
    assert says in str(caught.value)


def test_an_inversion(write: Write) -> None:
    path = write('[inversion]\nrecipe = "Turned"\nguidance = 3\n' + ANY)
    preset = load_preset(path, RECIPES, INVERSIONS)
    assert preset.inversion is not None
    made = preset.inversion.make("pipe", "image", "a cat", steps=9)
    assert made.given == ("pipe", "image", "a cat", 9, 3.0)
    back = load_preset(write(dump_preset(preset)), RECIPES, INVERSIONS)
    assert back.inversion is not None and back.inversion.arguments == {"guidance": 3.0}
    assert load_preset(write(ANY), RECIPES, INVERSIONS).inversion is None


def test_a_program_needs_no_editor(write: Write) -> None:
    path = write('[program]\nrecipe = "GrownMore"\nat = [8, 0]\nspread = 2\n')
    preset = load_preset(path, RECIPES, INVERSIONS, PROGRAMS)
    assert preset.program is not None and preset.takes_image and not preset.editors(["a cat"])
    made = preset.program.make("pipe", "image", "a cat", steps=9, seed=3)
    assert made.given == ("pipe", "image", "a cat", 9, 3, (8, 0), 2.0)
    back = load_preset(write(dump_preset(preset)), RECIPES, INVERSIONS, PROGRAMS)
    assert back.program is not None and back.program.arguments == {"at": (8, 0), "spread": 2.0}
    assert not back.specs
    beside = load_preset(write('[program]\nrecipe = "Grown"\n' + ANY), RECIPES, None, PROGRAMS)
    assert [spec.recipe for spec in beside.specs] == ["Maps"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('recipe = "grow"', "recipe='grow' is not known; did you mean 'Grown' or 'GrownMore'?"),
        ('recipe = "GrownMore"\nspred = 3', "did you mean 'spread'?; there are: spread, at"),
        ('recipe = "GrownMore"\nat = 3', "at = 3; give [a whole number, a whole number]"),
        ('recipe = "Grown"\nseed = 3', "seed belongs to the run; write seed = in [run]"),
        ('recipe = "Grown"\n[inversion]\nrecipe = "Turned"', "both [inversion] and [program]"),
    ],
)
def test_what_is_wrong_with_a_program_is_said(write: Write, text: str, says: str) -> None:
    with pytest.raises(InputError) as caught:
        load_preset(write(f"[program]\n{text}\n"), RECIPES, INVERSIONS, PROGRAMS)
    assert says in str(caught.value)


def test_an_editor_gets_the_run_s_image(write: Write) -> None:
    preset = load_preset(write('[[editor]]\nrecipe = "Seen"\nstrength = 2'), {"Seen": Seen})
    [editor] = preset.editors(["a cat"], "image")
    assert preset.takes_image and isinstance(editor, Seen) and editor.image == "image"
    with pytest.raises(InputError, match="image belongs to the run; give --image"):
        load_preset(write('[[editor]]\nrecipe = "Seen"\nimage = "x.png"'), {"Seen": Seen})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("recipe = 3", "[inversion]: recipe is missing; give one of: Turned"),
        ('recipe = "turnd"', "recipe='turnd' is not known; did you mean 'Turned'?"),
        (
            'recipe = "Turned"\nscale = 3',
            "(Turned): 'scale' is not a key of Turned; there are: gui",
        ),
        ('recipe = "Turned"\nguidance = "x"', "(Turned) guidance = 'x'; give a number"),
        ('recipe = "Turned"\nsteps = 3', "steps belong to the run; write steps = in [run]"),
        ('recipe = "Turned"\nimage = "x.png"', "image belongs to the run; give --image"),
        ('recipe = "Turned"\nprompt = "x"', "prompt belongs to the run; write prompt = in [run]"),
    ],
)
def test_what_is_wrong_with_an_inversion_is_said(write: Write, text: str, says: str) -> None:
    path = write(f"[inversion]\n{text}\n{ANY}")
    with pytest.raises(InputError) as caught:
        load_preset(path, RECIPES, INVERSIONS)
    assert str(caught.value).startswith(f"{path}: [inversion]") and says in str(caught.value)


def test_an_inversion_s_own_errors_name_the_file(write: Write) -> None:
    table = '[inversion]\nrecipe = "Turned"\nguidance = 0\n'
    spec = load_preset(write(table + ANY), RECIPES, INVERSIONS).inversion
    assert spec is not None
    with pytest.raises(InputError, match=r"stack.toml: \[inversion\] \(Turned\): guidance=0"):
        spec.make(None, None, "a cat", steps=9)
    with pytest.raises(InputError, match="a table expected"):
        load_preset(write("inversion = 3\n" + ANY), RECIPES, INVERSIONS)


@pytest.mark.parametrize("path", sorted(PRESETS.glob("*.toml")), ids=lambda path: path.stem)
def test_stacks_that_come_along(path: Path) -> None:
    """Each can be made, says what it does, and survives being written."""
    preset = load_preset(path, editors_by_name(), inversions_by_name(), programs_by_name())
    edits = preset.run.get("edit", [])
    edits = [edits] if isinstance(edits, str) else edits
    image = Image.new("RGB", (8, 8)) if preset.takes_image else None
    assert preset.editors([preset.run["prompt"], *edits], image) or preset.program or preset.hooks
    assert preset.model in EMBEDDED and path.read_text("utf-8").startswith("# ")
    assert all(lora.path.is_file() for lora in preset.loras)
    written = dump_preset(preset)
    assert any(table in written for table in ("[[editor]]", "[program]", "[[hook]]"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", ["holds no editor", "[[editor]]", "PromptToPrompt"]),
        ("editor = 3", ["holds no editor"]),
        ("x = [", ["is not TOML"]),
        ("[[editors]]", ["'editors'", "did you mean 'editor'?"]),
        ("[run]\nstep = 3", ["[run]", "'step'", "did you mean 'steps'"]),
        ("[run]\nsteps = 3.5", ["[run] steps = 3.5; give a whole number"]),
        ("[run]\nsteps = true", ["steps = True; give a whole number"]),
        ("run = 3", ["[run]", "a table expected"]),
        ("model = 3", ["model = 3; give a text"]),
        ("[[editor]]\nstrength = 3", ["[[editor]] 1", "recipe is missing", "Freedom"]),
        (
            '[[editor]]\nrecipe = "Promptoprompt"',
            ["'Promptoprompt' is not known", "did you mean 'PromptToPrompt'?", "Freedom"],
        ),
        (
            '[[editor]]\nrecipe = "PromptToPrompt"\ncros_replace = 1',
            ["[[editor]] 1 (PromptToPrompt)", "'cros_replace'", "did you mean 'cross_replace'"],
        ),
        (
            '[[editor]]\nrecipe = "PromptToPrompt"\ncross_replace = "much"',
            ["cross_replace = 'much'; give a number or [a number, a number] or a table"],
        ),
        (
            '[[editor]]\nrecipe = "PromptToPrompt"\nprompts = ["a", "b"]',
            ["prompts belong to the run", "[run]"],
        ),
        ('[[editor]]\nrecipe = "Freedom"', ["needs strength (a number)"]),
        ('[[editor]]\nrecipe = "Freedom"\nstrength = true', ["strength = True; give a number"]),
        (
            '[[editor]]\nrecipe = "Freedom"\nstrength = 1\nplace = "mid"',
            ["place = 'mid'; give 'up' or 'down'"],
        ),
        (
            '[[editor]]\nrecipe = "Freedom"\nstrength = 1\nwindow = [1.0]',
            ["window = [1.0]; give a number or [a number, a number]"],
        ),
        (
            '[[editor]]\nrecipe = "Freedom"\nstrength = 1\ntest = "x"',
            ["test = 'x'; give nothing that a file can hold"],
        ),
    ],
)
def test_what_is_wrong_is_said(write: Write, text: str, says: list[str]) -> None:
    path = write(text)
    with pytest.raises(InputError) as caught:
        load_preset(path, RECIPES)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message
    for part in says:
        assert part in message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x = " + "[" * 5000, "nested too deeply"),
        ("[run]\nsteps = " + "[" * 300 + "]" * 300, "steps = [[["),
        ("[run]\nseed = " + "9" * 5000, "can't be read: Exceeds the limit (4300 digits)"),
        ("[run]\nseed = 0x" + "f" * 5000, "seed = a number of thousands of digits; give a whole"),
        ("[run]\nguidance = 0x" + "f" * 5000, "guidance = a number of thousands of digits; give"),
        ("[run]\nguidance = nan", "guidance = nan; give a number"),
        ("[run]\nsteps = 0", "steps = 0; give a whole number >= 1"),
        ("[run]\nseed = -1", "seed = -1; give a whole number >= 0"),
        ('"' + "x" * 5000 + '" = 1', "xxx... is not a key of a stack"),
    ],
)
def test_files_that_mean_harm(write: Write, text: str, says: str) -> None:
    path = write(text + "\n")
    with pytest.raises(InputError) as caught:
        load_preset(path, RECIPES)
    message = str(caught.value)
    assert message.startswith(str(path)) and says in message and len(message) < 1000


# -- classes of installed packages -----------------------------------------------------------------

MODULE = """
from hookctl import Editor
class Sharpen(Editor):
    def __init__(self, strength: float = 1.0) -> None:
        self.strength = strength
    def before(self, state):
        pass
number = 3
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an installed package with the modules `editors` and `broken`."""
    site, name = tmp_path / "site", f"sharpening_{tmp_path.name.replace('-', '_')}"
    (site / name).mkdir(parents=True)
    (site / name / "__init__.py").touch()
    (site / name / "editors.py").write_text(MODULE)
    (site / name / "broken.py").write_text("raise RuntimeError('not\\nready')\n")
    info = site / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "RECORD").write_text(f"{name}/__init__.py,,\n{name}/editors.py,,\n")
    monkeypatch.syspath_prepend(site)
    return name


def test_an_editor_of_an_installed_package(write: Write, package: str) -> None:
    name = f"{package}.editors:Sharpen"
    preset = load_preset(write(f'[[editor]]\nrecipe = "{name}"\nstrength = 2\n'), RECIPES)
    [editor] = preset.editors()
    assert type(editor).__name__ == "Sharpen" and vars(editor) == {"strength": 2.0}
    back = load_preset(write(dump_preset(preset)), RECIPES)
    assert back.specs[0].recipe == name and back.specs[0].cls is preset.specs[0].cls


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("{}.editors:Sharpn", "has no Sharpn; did you mean 'Sharpen'?"),
        ("{}.editors:number", "number is no subclass of hookctl.Editor; there are: Sharpen"),
        ("{}.broken:Sharpen", "broken can't be imported (RuntimeError: not ready)"),
        ("{}.nothing:Sharpen", "nothing can't be imported (ModuleNotFoundError"),
        ("antigravity:Sharpen", "no installed package holds 'antigravity'; install it"),
        ("{}.editors:", "is no class; write package.module:Class"),
        ("../x:Sharpen", "is no class; write package.module:Class"),
        ("{}.editors:Sharpen.x", "is no class; write package.module:Class"),
    ],
)
def test_classes_that_are_refused(write: Write, package: str, name: str, says: str) -> None:
    path = write(f'[[editor]]\nrecipe = "{name.format(package)}"\n')
    with pytest.raises(InputError) as caught:
        load_preset(path, RECIPES)
    message = str(caught.value)
    assert message.startswith(f"{path}: [[editor]] 1: recipe=") and says in message


def test_code_beside_a_file_is_never_run(
    write: Write, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the folder of the command is on the path, and holds what looks installed."""
    (tmp_path / "brought.py").write_text("raise SystemExit('it ran')\n")
    info = tmp_path / "brought-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: brought\nVersion: 1.0\n")
    (info / "top_level.txt").write_text("brought\n")
    (tmp_path / f"{package}.py").write_text("raise SystemExit('it ran')\n")  # hides the package
    monkeypatch.chdir(tmp_path)
    for entry in ("", str(tmp_path)):
        for name in ("brought", package):
            path = write(f'[[editor]]\nrecipe = "{name}:Sharpen"\n')
            with monkeypatch.context() as patch:
                patch.syspath_prepend(entry)
                with pytest.raises(InputError, match=f"no installed package holds {name!r}"):
                    load_preset(path, RECIPES)


def test_the_recipe_s_own_errors_name_the_file(write: Write) -> None:
    path = write('[[editor]]\nrecipe = "Freedom"\nstrength = 10')
    with pytest.raises(InputError, match=r"stack.toml: \[\[editor\]\] 1 \(Freedom\): strength=10"):
        load_preset(path, RECIPES).editors()


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none.toml: there is no such file"):
        load_preset(tmp_path / "none.toml", RECIPES)
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="is not text"):
        load_preset(binary, RECIPES)


@pytest.mark.parametrize(
    ("value", "hint", "want"),
    [
        (1, float, 1.0),
        (1, int | float, 1),
        ([1, 2], tuple[float, ...], (1.0, 2.0)),
        ([[1], []], Sequence[Sequence[int]], [[1], []]),
        ({"a": [1, 2]}, Mapping[str, tuple[int, int]], {"a": (1, 2)}),
        ("up", Literal["up"], "up"),
        ({"a": 1}, dict[str, Any], {"a": 1}),
    ],
)
def test_values_take_the_form_of_their_hint(value: Any, hint: Any, want: Any) -> None:
    found = convert(value, hint)
    assert found == want and type(found) is type(want)


@pytest.mark.parametrize(
    ("value", "hint"),
    [(True, int), (True, float), (1, bool), (1.5, int), ("a", list[str]), ([1], list[str])],
)
def test_values_that_do_not_fit(value: Any, hint: Any) -> None:
    with pytest.raises(Mismatch):
        convert(value, hint)


def test_hints_in_words() -> None:
    assert describe(str | Sequence[str] | None) == "a text or a list of (a text)"
    assert describe(Mapping[str, float]) == "a table {word = a number}"
