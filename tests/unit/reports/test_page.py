"""The page stands alone, and no answer of a model becomes part of it."""

from dataclasses import replace
from html.parser import HTMLParser

import pytest

from patcher_pl.reports import Overlap, Results, Sample
from patcher_pl.reports.environment import hide_secrets
from patcher_pl.reports.overview import overview
from patcher_pl.reports.page import render_page
from patcher_pl.reports.runs import Run
from patcher_pl.reports.statistics import compare_all
from tests.campaigns import ATTACKS, campaign

_VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """Every element with its attributes, and the text inside of each kind of element."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self.open, self.mismatched = [], {}, [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.mismatched.append(tag)

    def handle_data(self, data):
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


def rendered(results, tmp_path, **options):
    frame = overview(results.curves)
    run = Run(name="a<b>", path=tmp_path / "results.json", results=results)
    comparisons = compare_all(list(frame["group"]))
    return render_page(frame, results.curves, [run], comparisons, title="Potions", **options)


@pytest.fixture(scope="module")
def small():
    """Two attacks, one of them with two settings, two seeds."""
    return campaign(attacks=ATTACKS[1:4], num_seeds=2, num_prompts=8, steps=[0, 20, 80])


@pytest.fixture(scope="module")
def page(small, tmp_path_factory):
    return Page(rendered(small, tmp_path_factory.mktemp("page")))


def test_the_page_is_well_formed_and_needs_nothing_else(page):
    assert not page.open
    assert not page.mismatched
    for tag, attrs in page.elements:
        assert tag not in {"script", "link", "iframe", "object", "base"}
        assert not [name for name in attrs if name.startswith("on")]
        source = attrs.get("src") or attrs.get("href") or "#"
        assert source.startswith(("#", "data:image/svg+xml;base64,")), source[:80]
    assert "@import" not in "".join(page.texts["style"])
    assert "url(" not in "".join(page.texts["style"])


def test_pictures_have_words_and_tables_have_headers(page):
    pictures = page.all("img")
    assert len(pictures) == 4, "curves, tokens, FLOPs, utility"
    assert all(len(picture["alt"]) > 40 for picture in pictures)
    assert all(header.get("scope") in {"row", "col"} for header in page.all("th"))
    targets = {attrs["id"] for _, attrs in page.elements if "id" in attrs}
    assert {link["href"][1:] for link in page.all("a")} <= targets
    assert page.all("html") == [{"lang": "en"}]


def test_an_answer_never_becomes_html(small, tmp_path):
    """Wrong if a model could write into the report that judges it."""
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    sample = Sample(attack_steps=0, prompt=f"Tea? {evil}", answer=evil, score=None)
    named = {"defense": f"tar{evil}", "attack": f"lora{evil}", "family": f"f{evil}"}
    curves = [
        replace(curve, samples=[sample], error=evil, utility={evil: [1.0, 1.0, 1.0]}, **named)
        for curve in small.curves[:2]
    ]
    results = Results(curves=curves, environment={"os": evil}, settings={evil: evil})
    found = Page(rendered(results, tmp_path, notes=[evil]))
    assert not found.all("script")
    assert not [attrs for attrs in found.all("img") if "onerror" in attrs]
    assert evil in "".join(found.texts["pre"])
    assert not found.mismatched


def test_answers_are_folded_away_and_announced(page):
    details = page.all("details")
    assert details
    assert not [attrs for attrs in details if "open" in attrs]
    assert "may be harmful" in " ".join(page.texts["p"])
    assert any("leaves of moon root" in text for text in page.texts["pre"])


def test_long_answers_are_cut_and_none_are_shown_on_demand(small, tmp_path):
    long = Sample(attack_steps=0, prompt="Tea?", answer="stir " * 2000, score=5)
    results = replace(small, curves=[replace(small.curves[0], samples=[long])])
    assert "stir " * 400 not in rendered(results, tmp_path)
    assert "Sample answers" not in rendered(results, tmp_path, num_samples=0)


def test_a_collapsed_model_is_marked_and_has_not_held(page):
    cells = " ".join("".join(page.texts["span"]).split())
    assert "collapsed" in cells
    marks = [mark["title"] for mark in page.all("abbr")]
    assert any("collapsed" in mark for mark in marks)


def test_secrets_in_settings_are_not_passed_on(page):
    settings = "".join(page.texts["pre"])
    assert '"api_key": "***"' in settings
    assert "secretsecret" not in settings
    hidden = hide_secrets({"tokenizer": "x", "hub_token": "y", "a": [{"url": "http://me:p@h"}]})
    assert hidden == {"tokenizer": "x", "hub_token": "***", "a": [{"url": "http://***@h"}]}


def test_nothing_measured_is_a_page_too(curve, tmp_path):
    failed = curve("sft", None, [], None, error="RuntimeError: full")
    mute = curve("tar", None, [None, None], None)
    text = rendered(Results(curves=[failed, mute], environment={}), tmp_path)
    assert "nothing scored" in text
    assert "RuntimeError: full" in text
    assert ">0.00<" not in text, "nothing scored is not 0"


def test_equal_results_give_equal_pages(small, tmp_path):
    few = replace(small, curves=small.curves[:2])
    assert rendered(few, tmp_path) == rendered(few, tmp_path)


def test_what_data_sets_have_in_common_is_told_or_said_to_be_unknown(small, tmp_path):
    """Wrong if a page passed trained prompts off as held-out ones."""
    assert "Not known: these results come from" in rendered(small, tmp_path)
    counts = {"num_first": 30, "num_second": 20, "shared_prompts": 17, "shared_rows": 4}
    overlap = [Overlap(first="defender", second="harmful prompts", **counts)] * 2
    page = Page(rendered(replace(small, overlap=overlap), tmp_path))
    assert page.texts["td"].count("17") == 1


def test_what_an_attack_has_found_out_is_on_the_page(tmp_path):
    results = campaign(attacks=ATTACKS[:1], num_seeds=1, num_prompts=3)
    assert "Remarks" not in rendered(results, tmp_path)
    curves = [replace(results.curves[0], remarks=["a cliff <b>"]), *results.curves[1:]]
    page = rendered(replace(results, curves=curves), tmp_path)
    assert page.count("a cliff &lt;b&gt;") == 1
