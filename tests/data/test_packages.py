"""Names of packages in code and text, and the lists that say which of them exist."""

from __future__ import annotations

import ast
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expunge.core.errors import InputError, OwnCodeError
from expunge.data.name_lists import AskedNames, NameList, read_list
from expunge.data.packages import OTHER, Mention, find, normalised, standard


def names(text: str, *ecosystems: str) -> list[str]:
    return [m.name for m in find(text, ecosystems or ("python",))]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("pip install foo bar", ["foo", "bar"]),
        ("Run `pip install foo bar` first", ["foo", "bar"]),
        ("$ pip3 install 'x[extra]>=1,<2' -r req.txt y==2.0", ["x", "y"]),
        ("python3.11 -m pip install --upgrade my_lib", ["my_lib"]),
        ("please pip install abc to go on.", ["abc"]),
        ("uv add a1; uv pip install b1 && poetry add c1@^2", ["a1", "b1", "c1"]),
        ("conda install -c conda-forge -n env numpy=1.2 python=3.9 conda-forge::zz", ["numpy", "zz"]),
        ("!pip install -q k ./local git+https://a.b/c.git wheels/w.whl", ["k"]),
        ("RUN pip install --no-cache-dir \\\n    m1 \\\n    m2\nCOPY x y", ["m1", "m2"]),
        ("pip install --index-url https://a.b/simple z", ["z"]),
        ("pip install {package} <name> $NAME", []),
        ("pip install -e . -r requirements.txt requirements.txt", []),
        ("pip install foo.", ["foo"]),
        ("pip installs packages; grip install no", []),
        ("pip uninstall foo", []),
    ],
)
def test_install_commands_of_python(text: str, wanted: list[str]):
    assert names(text) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("import a.b as c, d", ["a", "d"]),
        ("from x.y import z, (q)", ["x"]),
        ("from . import q\nfrom .r import s\nfrom .. import t", []),
        ("  import ind # why\nx = 1; import semi", ["ind", "semi"]),
        (">>> import pr\nIn [3]: import nb", ["pr", "nb"]),
        ("import the data\nimport data from the disk\nfrom there we import", []),
        ("# import no\n'import no'\nprint('import no')", []),
        ("important\nfromage import x", []),
        ("```python\nimport trunc", ["trunc"]),
        ("import a,\\\n", ["a"]),
    ],
)
def test_imports_of_python(text: str, wanted: list[str]):
    assert names(text) == wanted


@pytest.mark.parametrize(
    ("ecosystem", "text", "wanted"),
    [
        ("javascript", "import x from 'react'\nimport {b} from \"@s/p/q\"\nexport * from 'ex'", ["react", "@s/p", "ex"]),
        ("javascript", "const a = require('fs'); require(\"lodash/fp\"); await import('dyn')", ["fs", "lodash", "dyn"]),
        ("javascript", "import './no'\nrequire('../up')\nimport y from '/abs'", []),
        ("javascript", "import 'side'\nrequire(name)", ["side"]),
        ("javascript", "npm install -g @a/b@1 left-pad --save-dev\nyarn add zz\npnpm i pp", ["@a/b", "left-pad", "zz", "pp"]),
        ("rust", "cargo add serde --features derive tokio@1", ["serde", "tokio"]),
        ("ruby", "gem install rails -v 7\ngem 'sinatra', '~> 1'", ["rails", "sinatra"]),
        ("go", "go get -u github.com/a/b/v2@latest golang.org/x/tools/...", ["github.com/a/b/v2", "golang.org/x/tools"]),
    ],
)
def test_the_other_ecosystems(ecosystem: str, text: str, wanted: list[str]):
    assert names(text, ecosystem) == wanted
    assert names(text) == []


def test_several_ecosystems_and_a_pattern_go_together_in_order():
    text = "npm i one\npip install two\nSee RFC 2616 and RFC 9."
    found = find(text, ("python", "javascript"), r"RFC (\d+)")
    assert [(m.name, m.ecosystem) for m in found] == [
        ("one", "javascript"), ("two", "python"), ("2616", OTHER), ("9", OTHER),
    ]  # fmt: skip
    assert [m.name for m in find(text, (), "RFC")] == ["RFC", "RFC"]


WORD = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True)
LINE = st.one_of(
    WORD.map("import {}".format),
    st.lists(WORD, min_size=1, max_size=3).map(lambda w: "import " + ", ".join(w)),
    st.tuples(WORD, WORD).map(lambda p: f"from {p[0]}.sub import {p[1]}"),
    st.lists(WORD, min_size=1, max_size=3).map(lambda w: "pip install " + " ".join(w)),
    st.text(max_size=30),
)


@given(st.lists(LINE, max_size=8).map("\n".join))
@settings(max_examples=200, deadline=None)
def test_spans_lie_in_the_text_and_hold_the_name(text: str):
    found = find(text, ("python", "javascript", "rust", "ruby", "go"), r"\d+")
    for mention in found:
        assert 0 <= mention.start < mention.end <= len(text)
        assert text[mention.start : mention.end] == mention.name
        assert mention.name.strip() == mention.name
    assert found == sorted(set(found))


@given(st.lists(LINE.filter(lambda t: t.startswith(("import ", "from "))), min_size=1, max_size=6))
@settings(max_examples=100, deadline=None)
def test_imports_are_those_that_python_itself_reads(lines: list[str]):
    try:
        tree = ast.parse("\n".join(lines))
    except SyntaxError:  # a word of the language as a name, or text that looks like an import
        return
    wanted = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            wanted += [a.name.split(".")[0] for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            wanted.append(node.module.split(".")[0])
    assert sorted(names("\n".join(lines))) == sorted(wanted)


@given(st.text(max_size=12), st.integers(0, 12))
@settings(max_examples=100, deadline=None)
def test_names_are_compared_as_their_registries_do(name: str, cut: int):
    for ecosystem in ("python", "rust", "javascript", "ruby", "go"):
        key = normalised(name, ecosystem)
        assert normalised(key, ecosystem) == key
    assert normalised("Foo.Bar__baz-x", "python") == "foo-bar-baz-x"
    assert normalised("Foo_Bar", "rust") == "foo-bar"
    assert normalised("Foo_Bar", "javascript") == "foo_bar"
    assert normalised("Foo_Bar", "ruby") == "Foo_Bar"


def test_what_comes_with_the_language():
    assert standard("os", "python")
    assert standard("__future__", "python")
    assert standard("fs", "javascript")
    assert not standard("numpy", "python")
    assert not standard("os", "ruby")


def mention(name: str, ecosystem: str = "python") -> Mention:
    return Mention(0, len(name), name, ecosystem)


def test_a_list_knows_its_names_and_their_begins(tmp_path: Path):
    path = tmp_path / "names.txt"
    path.write_text("# what exists\nScikit_Learn\n\npyyaml\njavascript:left-pad\nrust:serde\n")
    held = read_list(path, ("python", "javascript"))
    assert held.valid(mention("scikit-learn"))
    assert held.valid(mention("SCIKIT.learn"))
    assert held.valid(mention("sklearn"))
    assert held.valid(mention("yaml"))
    assert not held.valid(mention("cv2"))
    assert not held.valid(mention("scikit"))
    assert not held.valid(mention("left-pad"))
    assert held.valid(mention("left-pad", "javascript"))
    assert held.valid(mention("pyyaml", "javascript"))
    assert not held.valid(mention("serde", "javascript"))
    assert not held.valid(mention("serde", "rust"))
    assert held.begins("scikit_", "python")
    assert held.begins("Scikit", "python")
    assert held.begins("py", "python")
    assert not held.begins("scikit-x", "python")
    assert not held.begins("serde", "python")
    assert not held.begins("z", "python")


@given(st.sets(WORD, min_size=1, max_size=20), WORD)
@settings(max_examples=100, deadline=None)
def test_a_list_is_a_set_with_prefixes(held: set[str], name: str):
    found = NameList(held, ("ruby",))
    for asked in (name, *held):
        assert found.valid(mention(asked, "ruby")) == (asked in held)
    for cut in range(1, len(name) + 1):
        assert found.begins(name[:cut], "ruby") == any(h.startswith(name[:cut]) for h in held)


def test_a_long_list_is_read_in_linear_time_and_asked_fast(tmp_path: Path):
    path = tmp_path / "names.txt"
    path.write_text("".join(f"package-{i}\n" for i in range(200_000)))
    begin = time.process_time()
    held = read_list(path, ("python",))
    assert len(held) == 200_000
    for i in range(2_000):
        assert held.valid(mention(f"package-{i}"))
        assert not held.valid(mention(f"package-{i}x"))
        assert held.begins(f"package-{i}", "python")
    assert time.process_time() - begin < 10


def test_lists_that_say_nothing_are_refused(tmp_path: Path):
    empty = tmp_path / "empty.txt"
    empty.write_text("# nothing\n\n")
    with pytest.raises(InputError, match="holds no name"):
        read_list(empty, ("python",))
    with pytest.raises(InputError, match="cannot be read"):
        read_list(tmp_path / "none.txt", ("python",))


def test_a_function_is_asked_once_for_each_name(tmp_path: Path):
    path = tmp_path / "checker_of_names.py"
    path.write_text(
        "asked = []\n"
        "def known(name, ecosystem):\n    asked.append((name, ecosystem))\n    return name.startswith('good')\n"
        "def broken(name, ecosystem):\n    raise ValueError('no such registry')\n"
        "def vague(name, ecosystem):\n    return 1\n"
    )
    held = AskedNames(f"{path}:known")
    assert held.valid(mention("Good_one"))
    assert held.valid(mention("good-one"))
    assert not held.valid(mention("bad"))
    assert held._function.__globals__["asked"] == [("good-one", "python"), ("bad", "python")]
    assert held.begins("goo", "python")
    assert not held.begins("ba", "python")
    assert not held.begins("goo", "ruby")
    with pytest.raises(OwnCodeError, match="no such registry"):
        AskedNames(f"{path}:broken").valid(mention("x"))
    with pytest.raises(InputError, match="returned 1 for 'x'"):
        AskedNames(f"{path}:vague").valid(mention("x"))
    with pytest.raises(InputError, match="has no function 'unknown'"):
        AskedNames(f"{path}:unknown")
    with pytest.raises(InputError, match="names no function"):
        AskedNames("names.txt")
