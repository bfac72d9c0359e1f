import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from experiments.reproduction import main, page
from tests.experiments.test_report import PLAIN, make_run


@pytest.fixture
def content(tmp_path):
    for seed, last in ((1, 0.5), (2, 0.8)):
        make_run(tmp_path / f"seed{seed}", replace(PLAIN, seed=seed), last=last)
    published = {"average": 80, "last": 66.5, "accuracy": [99, 66.5]}
    row = {
        "name": "MEMO",
        "source": "table 1",
        "published": published,
        "readout": "cnn",
        "runs": ["seed1", "seed2"],
    }
    sections = [{"title": "One class each", "text": "Text.", "figure": "memo.png", "rows": [row]}]
    return {"title": "Figures", "text": "Intro.", "sections": sections}


def written(tmp_path, content):
    path = tmp_path / "published.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def cells(text, row):
    return [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if row in line]


def test_published_figures_stand_beside_ours(tmp_path, content, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main([str(written(tmp_path, content))])
    text = (tmp_path / "REPRODUCTION.md").read_text()
    assert text.startswith("# Figures\n\nIntro.\n\n## One class each\n\nText.\n\n|")
    # 50 and 80: the mean 65, a sample variance of 450; averages with the first class's 100.
    accuracy, published, ours, run = cells(text, "MEMO")
    assert accuracy[1:6] == ["CNN", "table 1", "80.00", "82.50 ± 10.61", "+2.50"]
    assert accuracy[6:] == ["66.50", "65.00 ± 21.21", "-1.50"]
    assert published[1:] == ["CNN", "published", "99.00", "66.50"]
    assert ours[1:] == ["CNN", "ours", "100.00 ± 0.00", "65.00 ± 21.21"]
    assert run[1:5] == ["8; 8", "1, 2", "0, 0", "a CPU, threads: 1"]
    assert run[5] == "`--config seed1/config.yaml`"


def test_the_figure_has_published_curves_beside_ours(tmp_path, content):
    text, figures = page(written(tmp_path, content))
    assert text.endswith("![One class each: accuracy over classes seen](memo.png)\n")
    (axes,) = figures["memo.png"].axes
    ours, published = (
        line for line in axes.lines if len(line.get_xdata()) == 2 and line.get_linestyle() != "None"
    )
    assert list(ours.get_ydata()) == pytest.approx([100, 65])
    assert list(published.get_ydata()) == [99, 66.5]
    labels = {entry.get_text() for entry in figures["memo.png"].legends[0].get_texts()}
    assert labels == {"MEMO", "MEMO, published"}
    main([str(tmp_path / "published.yaml")])
    assert (tmp_path / "memo.png").read_bytes().startswith(b"\x89PNG")


def test_what_was_published_may_have_a_name_of_its_own(tmp_path, content):
    content["sections"][0]["rows"][0]["published"]["name"] = "MEMO, milestones not stated"
    text, figures = page(written(tmp_path, content))
    accuracy, published, ours, _ = cells(text, "MEMO")
    names = [row[0] for row in (accuracy, published, ours)]
    assert names == ["MEMO", "MEMO, milestones not stated", "MEMO"]
    labels = {entry.get_text() for entry in figures["memo.png"].legends[0].get_texts()}
    assert labels == {"MEMO", "MEMO, milestones not stated, published"}


def test_what_was_not_published_is_left_empty(tmp_path, content):
    content["sections"][0]["rows"][0]["published"] = {"last": 60}
    accuracy, ours, _ = cells(page(written(tmp_path, content))[0], "MEMO")
    assert accuracy[3:] == ["", "82.50 ± 10.61", "", "60.00", "65.00 ± 21.21", "+5.00"]
    assert ours[2] == "ours"


def test_a_folder_of_runs_has_their_own_configurations(tmp_path, content, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "both" / "one", replace(PLAIN, seed=3))
    content["sections"][0]["rows"][0]["runs"] = ["both"]
    *_, run = cells(page(written(tmp_path, content))[0], "MEMO")
    assert run[5] == "`--config both/one/config.yaml`"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "while parsing a flow node"),
        ("[]", "published.yaml: expected sections, text, title, differs in"),
        ("{title: a, text: b}", "published.yaml: expected .*differs in {'sections'}"),
        (
            "{title: a, text: b, sections: [{title: c, figure: d, rows: []}]}",
            "sections: .*in {'text'}",
        ),
    ],
)
def test_a_damaged_list_is_refused(tmp_path, capsys, text, message):
    (tmp_path / "published.yaml").write_text(text)
    with pytest.raises(SystemExit):
        main([str(tmp_path / "published.yaml")])
    assert re.search(message, " ".join(capsys.readouterr().err.split()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"runs": ["seed1", "copy"]}, "runs: expected different ones, got .* and .*copy"),
        ({"readout": "nme"}, "readout: expected one of cnn, got nme"),
        (
            {"published": {"mean": 1}},
            "published: expected some of name, average, last, accuracy, got",
        ),
        ({"published": {"accuracy": [1]}}, "accuracy: expected 2 figures for MEMO, got 1"),
        ({"runs": ["seed1", "other"]}, "runs: expected finished ones that differ in the seed"),
        ({"runs": ["nowhere"]}, "nowhere: expected a run folder"),
        ({"figure": 1}, "rows: expected name, published, .* differs in {'figure'}"),
    ],
)
def test_what_is_refused(tmp_path, content, capsys, change, message):
    make_run(tmp_path / "other", replace(PLAIN, method="der"))
    make_run(tmp_path / "copy", replace(PLAIN, seed=1))
    content["sections"][0]["rows"][0] |= change
    with pytest.raises(SystemExit):
        main([str(written(tmp_path, content))])
    error = " ".join(capsys.readouterr().err.split())
    assert re.search(message, error)
    assert not (tmp_path / "REPRODUCTION.md").exists()


def test_the_shipped_page_is_what_its_list_gives(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    results = Path("experiments/results")
    assert (results / "REPRODUCTION.md").read_text() == page(results / "published.yaml")[0]
