"""The HTML report: complete, safe, self-contained, the same every time."""

from __future__ import annotations

import builtins
import html as entities
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from expunge.audit.document import AuditDocument
from expunge.core.errors import InputError, MissingExtra
from expunge.core.results import Direction, Judgement, Number, Verdict
from expunge.report import html as page
from expunge.report.text import digits, interval_text, value_text

from . import factory

VOID = {"meta", "br", "img", "input", "hr", "link"}
EVIL = "<script>alert('x')</script><img src=x onerror=alert(1)> & \"quoted\" {{ 7 * 7 }}"


class Reader(HTMLParser):
    """Checks that tags nest, and keeps what the tests ask for."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[tuple[str, str]] = []
        self.tags: list[str] = []
        self.headings: list[int] = []
        self.images: list[dict[str, str | None]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        self.ids += [v for k, v in attrs if k == "id" and v]
        self.links += [(k, v or "") for k, v in attrs if k in ("href", "src", "xlink:href", "action", "srcset", "data")]
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag == "svg":
            self.images.append(found)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1] == tag, f"</{tag}> closes <{self.open[-1]}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text.append(data)


@pytest.fixture(scope="module")
def full() -> AuditDocument:
    return factory.full()


@pytest.fixture(scope="module")
def text(full: AuditDocument) -> str:
    return page.html([full])


@pytest.mark.parametrize("make", ["one", "full", "ungoverned", "several", "unrelated", "bare"])
def test_well_formed_accessible_and_offline(make: str) -> None:
    bare = factory.document(curves=[], distributions=[], samples=[], not_shown=[], protocol={}, signature={}, cost={})
    bare.models[2] = bare.models[2].model_copy(update={"numbers": {}, "judgement": None, "cost": {}, "settings": {}})
    other = factory.document(title="other data", data={"forget": {"records": 3, "digest": "b" * 64}})
    documents = {
        "one": [factory.document()],
        "full": [factory.full()],
        "ungoverned": [factory.ungoverned()],
        "several": [factory.full(), factory.document(title="second")],
        "unrelated": [factory.document(), other],
        "bare": [bare],
    }[make]
    read = Reader(page.html(documents))
    assert len(read.ids) == len(set(read.ids)), "an id occurs twice"
    local = [v.removeprefix("#") for _, v in read.links]
    assert all(v.startswith("#") for _, v in read.links), f"loads from elsewhere: {read.links}"
    assert set(local) <= set(read.ids), f"links to nowhere: {set(local) - set(read.ids)}"
    assert read.headings[0] == 1
    assert read.headings.count(1) == 1
    assert all(b - a <= 1 for a, b in zip(read.headings, read.headings[1:], strict=False)), f"a level is skipped: {read.headings}"
    assert all(i.get("aria-label") or i.get("aria-hidden") == "true" for i in read.images)
    assert not {"img", "link", "iframe", "object", "embed", "form"} & set(read.tags)
    assert read.tags.count("script") == 1


def test_every_number_stands_there_with_its_interval(full: AuditDocument, text: str) -> None:
    shown = " ".join(Reader(text).text)
    for key in {k for m in full.models for k in m.numbers}:
        assert key in shown
        numbers = [m.numbers[key] for m in full.models if key in m.numbers]
        for number in numbers:
            if number.value is None:
                assert number.note in shown
                continue
            assert value_text(number, digits(numbers)) in shown, (key, number)
            assert interval_text(number, digits(numbers)) in shown, (key, number)


def test_a_value_and_its_interval_share_a_cell(full: AuditDocument, text: str) -> None:
    number = full.entry("grad-diff").numbers["forget.probability"]
    places = digits([m.numbers["forget.probability"] for m in full.models])
    cell = rf">{re.escape(value_text(number, places))}<span class=\"ci\">{re.escape(interval_text(number, places))}</span></td>"
    assert re.search(cell, text)


def test_verdict_reason_weakest_link_and_thresholds_come_first(full: AuditDocument, text: str) -> None:
    top = entities.unescape(text[: text.index("At a glance</h2>")])
    for model in full.models:
        assert model.judgement is not None
        assert model.judgement.verdict.value in top
        assert model.judgement.reason in top
    for verdict in ("forgotten", "suppressed", "not-forgotten", "damaged", "undecided"):
        assert f'class="verdict v-{verdict}"' in top
    assert "Weakest link:</span> <strong>relearning</strong>, knows more" in top
    assert "<dt>relearn-margin</dt><dd>0.25</dd>" in top
    assert all(point in top for point in full.not_shown)


def test_flags_are_never_dropped(text: str) -> None:
    impossible = re.search(r'<td class="num flagged"[^>]*><sup>!(\d+)</sup>&#8239;1\.20<', text)
    assert impossible, "the impossible value is marked"
    notes = re.findall(r'<ol class="notes">(.*?)</ol>', text)
    assert any("impossible value 1.204: outside [0.0, 1.0]" in n for n in notes)
    assert any("too few distinct outputs" in n for n in notes)


def test_missing_is_a_dash_with_its_reason(text: str) -> None:
    assert re.search(r'<td class="num" data-sort=""><sup>\d+</sup>&#8239;\u2013</td>', text)
    assert "The adapter cannot give gradient norms of merged weights." in text


def test_what_no_model_has_is_told_once_below_the_table() -> None:
    made = factory.light()
    for model in made.models:
        for name in ("loss", "zlib"):
            model.numbers[f"membership.{name}.tpr-at-1"] = Number(
                value=None, direction=Direction.REFERENCE, flags=("too few: 200",)
            )
    text = page.html([made])
    told = re.findall(r"Not measured: ([^<]*)", text)
    assert len(told) == 1
    assert "membership.loss.tpr-at-1" in told[0]
    assert "membership.zlib.tpr-at-1): too few: 200." in told[0]


def test_a_note_of_a_whole_row_stands_at_its_name_and_others_at_their_cells() -> None:
    made = factory.light()
    for i, model in enumerate(made.models):
        number = model.numbers["model-utility"]
        model.numbers["model-utility"] = number.model_copy(update={"note": "nine parts"})
        model.numbers["forget-quality"] = model.numbers["forget-quality"].model_copy(update={"note": f"against {i}"})
    text = page.html([made])
    assert re.search(r"<th scope=\"row\">Model utility <sup>[a-z]</sup>", text)
    assert all(re.search(rf"<ol class=\"notes remarks\">.*<li>against {i}</li>", text) for i in range(3))
    assert len(re.findall(r"<li>nine parts</li>", text)) == 2  # at a glance and in the full table


def test_untrusted_text_is_shown_and_not_run() -> None:
    evil = factory.Character(EVIL, "unlearned", Verdict.FORGOTTEN, 3.0, 0.09, method=EVIL, settings={"note": EVIL}, flags=(EVIL,))
    made = factory.document((factory.TARGET, factory.GOLD, evil), title=EVIL, not_shown=[EVIL], protocol={EVIL: EVIL})
    made.models[2] = made.models[2].model_copy(update={"stopped": EVIL, "path": EVIL})
    made.samples[0] = made.samples[0].model_copy(update={"prompt": EVIL, "gold": EVIL, "id": EVIL, "answers": {"target": EVIL}})
    made.curves[0] = made.curves[0].model_copy(update={"title": EVIL, "y_label": EVIL})
    made.data["forget"]["source"] = EVIL
    made.signature["torch"] = EVIL
    read = Reader(page.html([made], title=EVIL))
    assert read.tags.count("script") == 1
    assert "img" not in read.tags
    assert not any("onerror" in image for image in map(str, read.tags))
    joined = "".join(read.text)
    assert joined.count("<script>alert('x')</script>") >= 10
    assert "{{ 7 * 7 }}" in joined


def test_control_and_bidirectional_characters_cannot_disguise() -> None:
    made = factory.document()
    answers = {"target": "a\x00b\x1b[31m \u202edlrow\u2066 \ud800", "npo": ""}
    made.samples[0] = made.samples[0].model_copy(update={"answers": answers})
    text = page.html([made])
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", text)
    assert "⟨U+202E⟩dlrow" in text
    assert "(nothing)" in text
    text.encode("utf-8")


def test_dollars_and_underscores_in_labels_survive_the_drawings() -> None:
    odd = factory.Character("_$x^2$_", "unlearned", Verdict.FORGOTTEN, 3.0, 0.09)
    drawn = re.findall(r"<text[^>]*>([^<]*)</text>", page.html([factory.document((factory.TARGET, factory.GOLD, odd))]))
    assert sum("_$x^2$_" in words for words in drawn) >= 3  # trade-off, distributions, relearning


def test_same_documents_same_page(full: AuditDocument, text: str) -> None:
    again = AuditDocument.model_validate_json(full.model_dump_json())
    assert page.html([again]) == text
    assert not re.search(r"matplotlib|<dc:date|<!--", text), "nothing of the drawing library's metadata stays"


def test_a_user_style_of_the_drawing_library_changes_nothing(full: AuditDocument, text: str) -> None:
    import matplotlib

    with matplotlib.rc_context({"lines.linewidth": 9, "text.usetex": True, "svg.fonttype": "path"}):
        assert page.html([full]) == text
        assert matplotlib.rcParams["lines.linewidth"] == 9


def test_a_control_that_fails_is_an_alarm() -> None:
    wrong = factory.Character("target", "target", Verdict.FORGOTTEN, 0.06, 0.06, 0.04, "train")
    text = page.html([factory.light((wrong, factory.GOLD, factory.NPO))])
    assert "A control came out wrong" in text
    assert "which was trained on the forget set, is judged" in text
    assert "A control came out wrong" not in page.html([factory.light()])


def test_a_control_that_is_undecided_is_a_doubt_and_no_alarm() -> None:
    unsure = factory.Character("retrained seed 1", "retrained", Verdict.UNDECIDED, 0.06, 0.06, 0.04, "train")
    text = page.html([factory.light((factory.TARGET, unsure, factory.NPO))])
    assert "A control is undecided" in text
    assert "the verdicts below are no surer" in text
    assert "alarm" not in text.split("</style>")[1]


def test_without_gold_nothing_is_called_forgotten() -> None:
    text = page.html([factory.ungoverned()])
    assert "npo is judged: no gold standard." in text
    assert 'class="verdict v-forgotten' not in text
    assert "No retrained model was audited: there is no gold standard to mark." in text


def test_several_audits_are_compared_or_the_page_says_why_not() -> None:
    same = page.html([factory.light(), factory.light((factory.TARGET, factory.GOLD, factory.METHODS[2]), title="second")])
    assert "Distance to the gold standard" in same
    other = factory.light(title="another request", data={"forget": {"records": 3, "digest": "b" * 64}})
    refused = page.html([factory.light(), other])
    assert "were audited on different forget data" in entities.unescape(refused)
    assert "Distance to the gold standard" not in refused
    assert refused.count("<article") == 2


def test_different_thresholds_stand_with_each_verdict() -> None:
    made = factory.light((factory.TARGET, factory.GOLD, factory.NPO, factory.METHODS[2]))
    judgement = made.models[3].judgement
    assert judgement is not None
    made.models[3] = made.models[3].model_copy(
        update={"judgement": Judgement(**(dict(judgement) | {"thresholds": {"forget-margin": 0.4}}))}
    )
    text = page.html([made])
    assert "<dt>forget-margin</dt><dd>0.4</dd>" in text
    assert "<dt>forget-margin</dt><dd>0.1</dd>" in text
    assert "Thresholds of these verdicts" not in text


def test_many_models_and_long_names_stay_readable() -> None:
    crowd = [factory.Character(f"method-{i} " + "x" * 60, "unlearned", Verdict.UNDECIDED, 2 + 0.1 * i, 0.1) for i in range(14)]
    text = page.html([factory.document((factory.TARGET, factory.GOLD, factory.GOLD_2, *crowd))])
    read = Reader(text)
    assert "Not drawn for lack of room:" in text
    assert "…" in "".join(read.text)
    for i in range(14):
        assert f"method-{i} " + "x" * 60 in "".join(read.text)


def test_declared_metric_titles_win() -> None:
    declared = {"metrics": {"probability": {"title": "Chance of the answer", "formula": "exp(mean log p)"}}}
    text = page.html([factory.light(protocol=declared)])
    assert "Chance of the answer" in text
    assert "exp(mean log p)" in text
    assert "Answer probability" not in text


def test_direction_arrows() -> None:
    made = factory.light()
    assert {n.direction for m in made.models for n in m.numbers.values()} >= {
        Direction.FORGET_DOWN,
        Direction.UTILITY_UP,
        Direction.ZERO,
    }
    text = page.html([made])
    row = re.search(r'<tr><th scope="row">Answer probability<span class="key">retain.probability</span>.*?</tr>', text, re.DOTALL)
    assert row
    assert "↑</b> better" in row.group()
    row = re.search(r'<tr><th scope="row">Answer probability<span class="key">forget.probability</span>.*?</tr>', text, re.DOTALL)
    assert row
    assert "↓</b> to retrained" in row.group()


def test_numbers_over_seeds_are_told_from_numbers_over_examples() -> None:
    made = factory.light()
    seeds = Number(value=0.4, low=0.3, high=0.5, over="seeds", level=0.9, n=5, direction=Direction.UTILITY_UP)
    made.models[2].numbers["over-seeds"] = seeds
    assert "90% interval over seeds and 95% interval over examples" in page.html([made])


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: object, **kwargs: object) -> object:
        if name == "matplotlib" or name.startswith("matplotlib."):
            raise ImportError(name)
        return real(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtra, match=r"expunge\[report\]"):
        page.html([factory.light()])


def test_no_document_is_an_error() -> None:
    with pytest.raises(InputError, match="no audit"):
        page.html([])


def test_written_file_is_the_page(tmp_path: Path, full: AuditDocument, text: str) -> None:
    page.write([full], tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == text


def test_a_loss_is_said_in_the_words_of_the_modality() -> None:
    """Rows have no tokens, and the error of a number is no cross-entropy."""
    said = {m: page.html([factory.document(modality=m)]) for m in ("language", "classification", "regression")}
    assert "Answer loss per token, nats" in said["language"]
    assert "Loss, nats, log scale" in said["classification"]
    assert "Loss, log scale" in said["regression"]
    for rows in ("classification", "regression"):
        assert "Answer loss" not in said[rows]
        assert "Loss of a row: the cross-entropy of its class in nats" in said[rows]
