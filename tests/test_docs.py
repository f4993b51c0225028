"""What keeps docs/ honest: every code block runs, every identifier is checked, every citation and link lands.

A result of the derivation companion is a box, a line ``> **F.3** name, links``, in a chapter of its letter.
Prose and docstrings cite it as ``(docs: F.3)``. It counts as checked if a python block of a page opens with
the comment ``# F.3`` and asserts something, or if a test function names it: ``docs: F.3``.
"""

import ast
import importlib
import inspect
import pkgutil
import re
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import pytest
from markdown_it import MarkdownIt

import tinydiff.nn
from tinydiff.kernels import many_steps

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"

# The letter of each chapter. While a letter has no page yet, its identifiers may be cited on credit; from
# the day one exists, every one of them must be in a page of its letter.
CHAPTERS = {
    "00-notation.md": "N",
    "01-forward.md": "F",
    "02-schedules.md": "S",
    "03-posterior.md": "P",
    "04-bound.md": "L",
    "05-learned-variances.md": "V",
    "06-sampling.md": "R",
    "07-backpropagation.md": "B",
    "08-backends.md": "A",
    "09-reading-map.md": "E",
    "11-fast-kernels.md": "A",
    "12-gpu.md": "A",
    "14-learned-schedules.md": "S",
}

# Modules that are mathematics, and the chapters that derive it: once these have pages, every public function
# and method cites an identifier.
MATHEMATICS = {
    **{f"nn.{m.name}": "B" for m in pkgutil.iter_modules(tinydiff.nn.__path__)},
    "models.mlp": "B",
    "models.unet": "B",
    "losses": "LVB",
    "optim": "B",
    "schedules": "S",
    "learned_schedule": "S",
    "continuous_bound": "S",
    "schedule_training": "S",
    "diffusion": "FPLV",
    "bound": "LV",
    "importance": "V",
    "mixture": "NLVR",
    "samplers": "R",
    "guidance": "R",
    "likelihood": "R",
    "testing": "FSPLVRB",
}

# Public, in those modules, and cites nothing.
EXEMPT = {
    "nn.module": "names and holds parameters",
    "nn.init.zeros": "a choice, not a result",
    "nn.init.ones": "a choice, not a result",
    "models.unet.UNet.run_embedded": "the call, from the sinusoids on",
    "models.unet.UNet.check_input": "checks an argument",
    "models.unet.misfit": "checks arguments",
    "models.mlp.MLP.check_input": "checks an argument",
    "optim.Adam.zero_grad": "book-keeping",
    "optim.Adam.state_dict": "book-keeping",
    "optim.Adam.load_state_dict": "book-keeping",
    "optim.EMA.state_dict": "book-keeping",
    "optim.EMA.load_state_dict": "book-keeping",
    "optim.warmup_cosine": "a choice, not a result",
    "bound.check_decoder": "checks an argument",
    "schedules.check_schedule": "checks an argument",
    "schedules.checked_timesteps": "checks an argument",
    "diffusion.check_diffusion": "checks an argument",
    "diffusion.matching": "checks arguments",
    "diffusion.GaussianDiffusion.T": "a length",
    "mixture.GaussianMixture.K": "a count",
    "mixture.GaussianMixture.D": "a length",
    "mixture.GaussianMixture.sample": "draws from the definition",
    "mixture.GaussianMixture.log_prob": "the definition's logarithm",
    "importance.LossSecondMomentSampler.T": "a length",
    "importance.LossSecondMomentSampler.update": "book-keeping",
    "importance.LossSecondMomentSampler.state_dict": "book-keeping",
    "importance.LossSecondMomentSampler.load_state_dict": "book-keeping",
    "samplers.respaced": "the same process on some of its times",
    "samplers.sample": "runs iterate_samples to its end",
}

# What a fence may be. Only ``python`` is run, so nothing that is Python may go by another name.
FENCES = {"python", "text", "bash", "math", "mermaid"}

IDENTIFIER = r"[A-Z]\.\d+"
BOX = re.compile(rf"^> \*\*({IDENTIFIER})\*\*", re.M)
CITATION = re.compile(rf"docs:\s*({IDENTIFIER}(?:,\s*{IDENTIFIER})*|)")
LINK = re.compile(r"(?<!\\)\[([^\]]*)\]\(([^)\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"")
# In prose, F.3 alone cites too; an equation of a paper says so: "eq. F.3", "appendix B.2".
OF_A_PAPER = r"\b(?i:eqs?|equations?|appendix|section|theorem|proposition|lemma)\.? \(?"
MENTION = re.compile(rf"({OF_A_PAPER})?\b({IDENTIFIER})\b")


@dataclass(frozen=True)
class Block:
    """A fenced block: the line of its fence, its language, its text."""

    line: int
    language: str
    text: str

    @property
    def checks(self) -> list[str]:
        """The identifiers of the comment that opens it."""
        first = self.text.split("\n", 1)[0]
        match = re.match(rf"# ({IDENTIFIER}(?:, {IDENTIFIER})*)(?![\w.])", first)
        return match[1].split(", ") if match and self.language == "python" else []


@dataclass(frozen=True)
class Page:
    """A Markdown file, taken apart into prose (code blanked out, line numbers kept) and fenced blocks."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    @cached_property
    def _parts(self) -> tuple[str, list[Block]]:
        prose, blocks, fence = [], [], None
        for number, line in enumerate(self.path.read_text(encoding="utf-8").split("\n"), start=1):
            if fence is None and (opened := re.match(r"(`{3,}|~{3,})(.*)$", line)):
                fence, language, start, text = opened[1], opened[2].strip(), number, []
                prose.append("")
            elif fence is not None and line.rstrip() == fence:
                blocks.append(Block(start, language, "\n".join(text)))
                fence = None
                prose.append("")
            elif fence is not None:
                text.append(line)
                prose.append("")
            else:
                prose.append(line)
        assert fence is None, f"{self.name}:{start}: this fence is never closed"
        return "\n".join(prose), blocks

    @property
    def prose(self) -> str:
        return self._parts[0]

    @property
    def blocks(self) -> list[Block]:
        return self._parts[1]

    @cached_property
    def anchors(self) -> set[str]:
        """What a heading is linked as."""
        headings = re.findall(r"^#+ (.*?)\s*$", self.prose, re.M)
        return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


PAGES = [Page(path) for path in sorted(DOCS.glob("*.md"))]
PAGES_AND_README = PAGES + [Page(path) for path in [ROOT / "README.md"] if path.exists()]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.path.name)
each_page_and_readme = pytest.mark.parametrize("page", PAGES_AND_README, ids=lambda page: page.path.name)


def boxed() -> list[str]:
    """Every identifier that a page boxes."""
    return [identifier for page in PAGES for identifier in BOX.findall(page.prose)]


def has_page(letter: str) -> bool:
    return any((DOCS / page).exists() for page, its_letter in CHAPTERS.items() if its_letter == letter)


def unknown(identifiers: list[str]) -> list[str]:
    """Those that do not exist; one whose chapter has no page yet is not held against the citer."""
    known = set(boxed())
    return [i for i in identifiers if i not in known and (i[:1] not in CHAPTERS.values() or has_page(i[0]))]


def citations(text: str) -> list[str]:
    """The identifiers of every ``docs: X.1, X.2``; "" where none follows."""
    return [name.strip() for found in CITATION.findall(text) for name in found.split(",")]


# --- code blocks


@each_page
def test_blocks_run_in_order_as_pasted(page, tmp_path, monkeypatch):
    """In `many_steps`: a loop of small products is ten times slower else, where other programs run, too."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    with many_steps():
        for block in page.blocks:
            if block.language == "python":
                source = "\n" * block.line + block.text  # so that a traceback names the line of the page
                exec(compile(source, page.name, "exec", dont_inherit=True), namespace)
    assert not list(tmp_path.iterdir()), "a block wrote a file"


def test_the_lines_of_the_readme_run(tmp_path, monkeypatch):
    """In order, as pasted, but with two steps of training and sampling, and noise for one's own pictures."""
    monkeypatch.chdir(tmp_path)
    np.save("classes.npy", np.array([0, 9, 3, 3]))
    np.save("images.npy", np.random.default_rng(0).integers(256, size=(4, 32, 32, 3), dtype=np.uint8))
    for name in ("train", "sample"):
        ours = getattr(tinydiff, name)
        monkeypatch.setattr(
            tinydiff, name, lambda *given, ours=ours, **how: ours(*given, **how | {"steps": 2})
        )
    namespace = {}
    for block in Page(ROOT / "README.md").blocks:
        if block.language == "python":
            exec(compile("\n" * block.line + block.text, "README.md", "exec", dont_inherit=True), namespace)
    with pytest.raises(AssertionError) as error:
        namespace["testing"].assert_q_sample(
            lambda x0, t, noise: namespace["yours"](x0, t, noise * (1 - namespace["abar"][t]) ** 0.5),
            tinydiff.linear_schedule(),
        )
    said = Page(ROOT / "README.md").path.read_text(encoding="utf-8").replace("\n", " ")
    assert f"AssertionError: {error.value}".replace("\n", " ") in said
    assert namespace["points"].shape == (1000, 2) and namespace["dx"].shape == (1000, 2)
    pictures = namespace["pictures"]
    assert pictures.shape == (16, 32, 32, 3) and -1 <= np.min(pictures) < np.max(pictures) <= 1
    assert namespace["asked_for"].shape == (3, 32, 32, 3)
    assert {path.name for path in (tmp_path / "runs" / "mine").iterdir()} >= {"model.safetensors"}


@each_page
def test_no_block_escapes_being_run(page):
    languages = {block.language for block in page.blocks}
    assert languages <= FENCES, f"fences of these kinds are not run: {sorted(languages - FENCES)}"
    lines = enumerate(page.prose.split("\n"), start=1)
    hidden = [number for number, line in lines if re.match(r"[\s>]*(```|~~~)\s*py", line)]
    assert not hidden, f"lines {hidden}: a fence that is indented or quoted is not run"


@each_page
def test_a_block_that_claims_to_check_asserts(page):
    idle = [b.line for b in page.blocks if b.checks and not re.search(r"\b(assert|check)", b.text)]
    assert not idle, f"lines {idle}: these blocks open with an identifier and assert nothing"


# --- mathematics

FORMULA = re.compile(r"\$\$.+?\$\$|\$[^$]+?\$", re.S)


def mangled(text: str) -> list[str]:
    """The formulas that a page changes before they are typeset: GitHub, and others, read Markdown first.

    Two underscores after a bracket or an apostrophe, as in E_{x} E_{y}, stress what is between them; a
    backslash before a sign, as in a thin space, goes; < opens a tag. Nor is a formula found that touches a
    word or an asterisk.
    """
    found = []
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        parts, source = token.children or [], re.sub(r"`[^`]+`", "``", token.content)
        read = "".join(
            "\n" if p.type == "softbreak" else p.content if p.type == "text" else "`" for p in parts
        )
        for formula in FORMULA.finditer(source if parts else ""):
            before, after = source[: formula.start()], source[formula.end() :]
            if formula[0] not in read or re.search(r"[\w*-]\Z", before) or re.match(r"[\w*-]", after):
                found.append(formula[0])
    return found


@each_page_and_readme
def test_formulas_pass_through_markdown(page):
    assert mangled(page.path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "text",
    [
        r"$\mathbf{a}_{i} + \mathbf{b}_{j}$",
        r"$\mathbf{a}_{i}$ and $\mathbf{b}_{j}$",
        r"$\beta'_i$ and $\beta'_{j}$",
        r"$a \, b$",
        r"$\{a\}$",
        "$a <b> c$",
        "$[a](b)$",
        "*$a$ is stressed*",
        "the $k$-th",
    ],
)
def test_a_mangled_formula_is_seen(text):
    assert mangled(text)
    assert mangled(f"| a table |\n| --- |\n| {text} |")


# --- identifiers


def test_identifiers_are_unique():
    all_of_them = boxed()
    assert sorted(set(all_of_them)) == sorted(all_of_them)


@each_page
def test_identifiers_are_in_the_chapter_of_their_letter(page):
    strays = [i for i in BOX.findall(page.prose) if CHAPTERS.get(page.path.name) != i[0]]
    assert not strays


@each_page
def test_every_identifier_is_checked(page):
    checked = {i for other in PAGES for block in other.blocks for i in block.checks} | cited_in_tests()
    unchecked = [i for i in BOX.findall(page.prose) if i not in checked]
    assert not unchecked, "no code block opens with these identifiers and no test names them"


@cache
def cited_in_tests() -> set[str]:
    """Identifiers that a test function names, anywhere from its decorators to its last line."""
    found = set()
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        if "docs:" not in text or path == Path(__file__).resolve():
            continue
        lines = text.split("\n")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                found.update(citations("\n".join(lines[first - 1 : node.end_lineno])))
    return found


FOLDERS = ("tinydiff", "demos", "docs", "tests")
SOURCES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
SOURCES.remove(Path(__file__).resolve())  # it shows what a citation looks like


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_code_cites_identifiers_that_exist(path):
    assert unknown(citations(path.read_text(encoding="utf-8"))) == []


@each_page_and_readme
def test_pages_cite_identifiers_that_exist(page):
    prose = re.sub(r"`[^`\n]*`", "", page.prose)  # code between backticks may show how to cite
    mentioned = [name for of_a_paper, name in MENTION.findall(prose) if not of_a_paper]
    mentioned += [i for block in page.blocks for i in block.checks]
    assert unknown(mentioned) == []


# --- papers


def test_the_reading_map_refers_to_the_papers_that_it_names():
    """By first author and year: chapter 9's headings and tables name its references, and no others."""
    page = (DOCS / "09-reading-map.md").read_text(encoding="utf-8")
    body, references = page.split("\n## References\n")
    headings = re.findall(r"^### (.+):", body, re.M)
    rows = re.findall(r"^\| ([^|]+) \|", body.split("\n### Others\n")[1].split("\n## ")[0], re.M)
    paper = re.compile(r"([A-Z][\w-]+)(?:(?:,| &| et al)[^\d]*)? (\d{4})")
    named = {found for text in [*headings, *rows] for found in paper.findall(text)}
    assert named == {paper.match(entry).groups() for entry in references.split("\n- ")[1:]}
    assert len(named) > 30


# --- links


@each_page_and_readme
def test_links_lead_somewhere(page):
    dead = []
    for _, target, attribute in LINK.findall(page.prose):
        path, _, anchor = (target or attribute).partition("#")
        if "://" in path or path.startswith("mailto:"):
            continue
        file = (page.path.parent / path).resolve() if path else page.path
        inside = file == ROOT or ROOT in file.parents
        to_heading = file.suffix == ".md" and anchor
        if not inside or not file.exists() or (to_heading and anchor not in Page(file).anchors):
            dead.append(target or attribute)
    assert not dead


@each_page_and_readme
def test_links_to_functions_lead_to_their_source(page):
    """[`nn.silu.silu`](../tinydiff/nn/silu.py) imports, and is written in that file."""
    wrong = []
    for text, target, _ in LINK.findall(page.prose):
        file = (page.path.parent / target.partition("#")[0]).resolve()
        name = re.fullmatch(r"`([\w.]+?)(?:\(\))?`", text)
        if not name or file.suffix != ".py" or ROOT / "tinydiff" not in file.parents:
            continue
        if name[1].endswith(".py"):
            correct = file.as_posix().endswith("/" + name[1])
        else:
            correct = source_file(name[1].removeprefix("tinydiff.")) == file
        if not correct:
            wrong.append(f"{name[1]} is not in {target}")
    assert not wrong


def source_file(name: str) -> Path | None:
    """The file in this checkout that defines ``tinydiff.<name>``, or None if there is no such thing."""
    parts = ["tinydiff", *name.split(".")]
    for length in range(len(parts), 0, -1):
        try:
            thing = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        file = thing.__file__
        for part in parts[length:]:
            if not hasattr(thing, part):
                return None
            thing = getattr(thing, part)
            thing = getattr(thing, "fget", None) or getattr(thing, "func", None) or thing
            if inspect.isclass(thing) or inspect.isroutine(thing):
                file = inspect.getsourcefile(inspect.unwrap(thing))
        # The package may be an installed copy; links are to the sources beside the pages.
        package = Path(tinydiff.__file__).resolve().parent
        return ROOT / "tinydiff" / Path(file).resolve().relative_to(package)
    return None


# --- coverage


@pytest.mark.parametrize("name", [m for m in MATHEMATICS if m not in EXEMPT])
def test_mathematics_cites_its_identifier(name):
    missing = [letter for letter in MATHEMATICS[name] if not has_page(letter)]
    if missing:
        pytest.skip(f"chapters {', '.join(missing)} are not written yet")
    functions = public_functions(name)
    silent = [f for f in functions if f not in EXEMPT and not CITATION.search(functions[f])]
    assert not silent, "these public functions cite no identifier (docs: X.n)"


def test_exemptions_are_still_needed():
    """An exempt function exists and still cites nothing; else the exemption goes."""
    functions = {}
    for name in MATHEMATICS:
        if name not in EXEMPT:
            functions.update(public_functions(name))
    names = [name for name in EXEMPT if name not in MATHEMATICS]
    stale = [name for name in names if name not in functions or CITATION.search(functions[name])]
    assert not stale


def public_functions(module_name: str) -> dict[str, str]:
    """Name -> source of the functions in a module's ``__all__`` and of its classes' public methods.

    ``__call__`` is public; a class of data only (no such method) has nothing to cite.
    """
    module = importlib.import_module(f"tinydiff.{module_name}")
    found = {}
    for name in module.__all__:
        thing = getattr(module, name)
        if inspect.isclass(thing):
            for method_name, method in vars(thing).items():
                method = getattr(method, "fget", None) or getattr(method, "func", None) or method
                if inspect.isfunction(method) and (method_name == "__call__" or method_name[0] != "_"):
                    found[f"{module_name}.{name}.{method_name}"] = inspect.getsource(method)
        elif inspect.isfunction(thing):
            found[f"{module_name}.{name}"] = inspect.getsource(thing)
    return found
