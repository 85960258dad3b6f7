"""What a run keeps for the inspector, and the page that is made of it: figures that are right, text that stays
text; in a browser, clicks and keys, narrow and dark windows, and nothing to complain of."""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import Browser, browser, program
from inspected import CLIP, HOSTILE, SAMPLES, hostile_run, large_run, make_run
from test_resume import Lottery

from dopsd.inspector import command as inspector
from dopsd.inspector.read import read_run
from dopsd.look import POSITIONS, TOP
from dopsd.models import load_model
from dopsd.trainer import Trainer

# WCAG 2: contrast of every text that is seen with what is behind it; those below are returned.
CONTRAST = """
(() => {
  const parse = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = (color) => color.slice(0, 3).map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const color = parse(getComputedStyle(node).backgroundColor);
      if (color.length === 3 || color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    if (!own || !node.checkVisibility() || ["SCRIPT", "OPTION"].includes(node.tagName)) continue;
    const [one, other] = [light(parse(getComputedStyle(node).color)), light(behind(node))].sort((a, b) => b - a);
    const ratio = (one + 0.05) / (other + 0.05);
    if (ratio < 4.5) found.push(`${node.tagName}.${node.className} ${ratio.toFixed(2)}`);
  }
  return [...new Set(found)];
})()
"""


@pytest.fixture(scope="module")
def folder(random_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's; read only."""
    return make_run(random_model, tmp_path_factory.mktemp("inspect") / "run")


@pytest.fixture
def damaged(folder: Path, tmp_path: Path) -> Path:
    """A copy of it, without its checkpoints."""
    return Path(shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoint-*")))


def page_of(path: Path) -> dict[str, Any]:
    """The content that a page has in it."""
    (block,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.DOTALL)
    return json.loads(block)


def test_the_figures_are_those_of_plain_logits(folder: Path, random_model: Path) -> None:
    """Before training, every kept row against both sides' whole distributions in fp64: divergence, clipped share, the
    likeliest tokens; K is the teacher's most confident candidates; other rows are the most different of the rest."""
    model, tokenizer = load_model(str(random_model))
    model, mask = model.double().eval().requires_grad_(False), model.config.mask_token_id
    content = json.loads((folder / "inspect" / "before.json").read_text())
    assert len(content["samples"]) == SAMPLES
    checked = 0
    for sample in content["samples"]:
        prompt = tokenizer(sample["prompt"], add_special_tokens=False, return_tensors="pt")["input_ids"][0]
        tokens, reveal = torch.tensor(sample["tokens"]), torch.tensor(sample["reveal_step"])
        assert [state["step"] for state in sample["states"]] == list(range(int(reveal.max()) + 1))
        for state in sample["states"][::3]:
            step, shown = state["step"], torch.zeros(len(tokens), dtype=torch.bool)
            shown[state["shown"]] = True
            ours = torch.where((reveal < step) & (reveal >= 0), tokens, mask)
            theirs = torch.where(shown, tokens, ours)
            hidden = [model.hidden_states(torch.cat((prompt, side))[None])[0, len(prompt) :] for side in (ours, theirs)]
            s, t = ((rows @ model.lm_head_weight.T).softmax(-1) for rows in hidden)
            terms = s * (s / t).log()
            first = int((reveal == step).nonzero()[0]) // 8 * 8
            candidates = [
                place for place in range(first, first + 8) if not 0 <= reveal[place] < step and not shown[place]
            ]
            # The mask token is never chosen, and confidence is of the others alone.
            others = t.clone()
            others[:, mask] = 0
            confidence = (others / others.sum(-1, keepdim=True)).amax(-1)
            k = min(int((reveal == step).sum()), len(candidates))
            chosen = sorted(sorted(candidates, key=lambda place: -confidence[place])[:k])
            rows = {row[0]: row for row in state["rows"]}
            assert [place for place, row in rows.items() if row[1]] == chosen
            kl = terms.sum(-1)
            rest = sorted(set(candidates) - set(chosen), key=lambda place: -kl[place])
            assert sorted(rows) == sorted([*chosen, *rest[: max(POSITIONS, k) - k]])
            for place, (_, _, divergence, clipped, *sides) in rows.items():
                # Four digits are kept; the sum itself is of fp32 terms that may cancel.
                torch.testing.assert_close(divergence, float(kl[place]), rtol=1e-3, atol=2e-6)
                torch.testing.assert_close(clipped, float((terms[place] > CLIP).double().mean()), rtol=1e-3, atol=0)
                for ids, probabilities, whole in ((*sides[:2], t[place]), (*sides[2:], s[place])):
                    assert len(ids) == TOP
                    torch.testing.assert_close(probabilities, whole.topk(TOP).values.tolist(), rtol=1e-3, atol=1e-6)
                    torch.testing.assert_close(probabilities, whole[ids].tolist(), rtol=1e-3, atol=1e-6)
                checked += 1
    assert checked > 20


def test_what_is_kept_of_updates(make_trainer: Callable[..., Trainer], random_model: Path, tmp_path: Path) -> None:
    """Of four updates two, spread over the run, each with a trajectory that it learnt; a run that goes on has the
    same. Keeping none leaves nothing, and either way the run is the same to the bit."""
    options = ("--model", str(random_model), "--max_steps", "4", "--save_steps", "2", "--lora_dropout", "0.1")
    options += ("--steps", "6", "--eval_strategy", "no", "--pass_k", "1", "--per_device_train_batch_size", "4")
    whole, without = tmp_path / "whole", tmp_path / "without"
    trainer = make_trainer(*options, "--inspect_samples", "2", "--output_dir", str(whole), task=Lottery())
    trainer.train()
    files = {path.name: path.read_bytes() for path in (whole / "inspect").iterdir()}
    assert sorted(files) == ["update-1.json", "update-3.json"]
    for content in map(json.loads, files.values()):
        (sample,) = content["samples"]
        assert sample["score"] == 1 and any(row[1] for state in sample["states"] for row in state["rows"])
    shutil.rmtree(whole / "inspect")
    again = make_trainer(*options, "--inspect_samples", "2", "--output_dir", str(whole), task=Lottery())
    again.train(resume_from_checkpoint=str(whole / "checkpoint-2"))
    assert {path.name: path.read_bytes() for path in (whole / "inspect").iterdir()} == {
        "update-3.json": files["update-3.json"]
    }
    none = make_trainer(*options, "--inspect_samples", "0", "--output_dir", str(without), task=Lottery())
    none.train()
    assert not (without / "inspect").exists()
    for (name, one), (_, other) in zip(
        trainer.student.named_parameters(), none.student.named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name
    logs = [[entry.get("forward_tokens") for entry in one.state.log_history] for one in (trainer, none)]
    assert logs[0] == logs[1]  # what is kept is not counted as the update's


def test_a_page_has_all_that_the_run_has(folder: Path, tmp_path: Path, command: Callable[..., Any]) -> None:
    """Every logged figure, every held-out response before and after, every trajectory; nothing is fetched."""
    out = tmp_path / "page.html"
    status, printed, _ = command(inspector.main, str(folder), "--out", str(out))
    assert status == 0 and str(out) in printed and f"{2 * SAMPLES + 2} trajectories" in printed
    page = page_of(out)
    header = (folder / "metrics.csv").read_text().partition("\n")[0].split(",")
    assert {figure["name"] for figure in page["figures"]} == set(header) - {"step", "epoch"}
    loss = next(figure for figure in page["figures"] if figure["name"] == "loss")
    assert [step for step, _ in loss["series"][0]] == [1, 2]
    held_out = {
        moment: next(iter(json.loads((folder / f"held_out_{moment}.json").read_text())["tokens_per_step"].values()))
        for moment in ("before", "after")
    }
    problems = [item for item in page["items"] if not item["update"]]
    for number, item in enumerate(problems):
        assert [view["moment"] for view in item["views"]] == ["before", "after"]
        for view in item["views"]:
            assert view["response"] == held_out[view["moment"]][number]["response"]
            assert (view["sample"] is not None) == (number < SAMPLES)
    kept = json.loads((folder / "inspect" / "after.json").read_text())
    sample, first = kept["samples"][0], problems[0]["views"][1]["sample"]
    texts = [page["texts"][index] for index in first["tokens"]]
    assert texts == [kept["texts"][str(token)] for token in sample["tokens"]]
    assert first["reveal"] == sample["reveal_step"]
    # Addresses that are no part of the data: the name of SVG, which is not fetched.
    text = out.read_text()
    assert set(re.findall(r"https?://[^\"' ]+", text)) <= {"http://www.w3.org/2000/svg"}
    assert "Content-Security-Policy" in text and not re.search(r"<(script|link|img)[^>]+src=", text)


def test_a_run_that_is_not_done(damaged: Path, tmp_path: Path) -> None:
    """Without a report, the log and the responses after training there is a page of what is there."""
    for name in ("report.json", "metrics.csv", "held_out_after.json"):
        (damaged / name).unlink()
    shutil.rmtree(damaged / "inspect")
    inspector.main([str(damaged)])
    page = page_of(damaged / "inspect.html")
    assert page["figures"] == [] and page["runs"][0]["facts"]["finished"] == "no"
    assert {view["moment"] for item in page["items"] for view in item["views"]} == {"before"}


def test_text_from_data_ends_no_block(damaged: Path) -> None:
    """What rows and responses say is in the page as JSON without a less-than sign, and comes out as it was."""
    hostile_run(damaged)
    inspector.main([str(damaged)])
    text = (damaged / "inspect.html").read_text()
    assert HOSTILE not in text and text.count("</script>") == 2
    page = page_of(damaged / "inspect.html")
    assert page["items"][0]["prompt"] == HOSTILE and HOSTILE in page["texts"]


def test_two_runs_are_compared(folder: Path, damaged: Path, tmp_path: Path) -> None:
    """The same problem of both is one, and options are those that differ."""
    options = json.loads((damaged / "run.json").read_text())
    options["teaching"]["clip"] = 7.0
    (damaged / "run.json").write_text(json.dumps(options))
    inspector.main([str(folder), "--compare", str(damaged), "--out", str(tmp_path / "page.html")])
    page = page_of(tmp_path / "page.html")
    assert page["options"] == [["teaching.clip", [str(CLIP), "7.0"]]]
    assert [len(item["views"]) for item in page["items"]] == [4] * 4 + [2] * 2


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("run.json", None, r"run='.*' can't be used: it is no folder of a run, which has a run.json"),
        ("run.json", "{", r"run.json: not valid JSON"),
        ("metrics.csv", "step,loss\n1,0.5\n2,x\n", r"metrics.csv is damaged, or no run wrote it: ValueError"),
        ("held_out_after.json", '{"tokens_per_step": {}}', r"held_out_after.json is damaged"),
        (
            "held_out_after.json",
            '{"tokens_per_step": {"2": [{"score": 1}]}}',
            r"held_out_after.json is damaged.*KeyError",
        ),
        ("inspect/before.json", '{"samples": [{"tok', r"before.json is damaged"),
        ("inspect/before.json", '{"texts": {}, "samples": [{"tokens": [1]}]}', r"before.json is damaged.*KeyError"),
        ("inspect/update-1.json", "[]", r"update-1.json is damaged.*TypeError"),
        ("report.json", "{}", r"report.json is damaged.*KeyError"),
    ],
)
def test_a_file_that_is_not_a_runs(
    name: str, content: str | None, said: str, damaged: Path, command: Callable[..., Any]
) -> None:
    """One sentence that names it, and no page."""
    (damaged / name).unlink() if content is None else (damaged / name).write_text(content)
    status, _, error = command(inspector.main, str(damaged))
    assert status == (2 if content is None else 1) and error.count("\n") == 1
    assert re.search(said, error), error
    assert not (damaged / "inspect.html").exists()


def test_rows_that_do_not_fit_are_told(damaged: Path) -> None:
    """A position that the response has not, a token without a text."""
    path = damaged / "inspect" / "after.json"
    content = json.loads(path.read_text())
    for change in (
        lambda sample: sample["states"][0]["rows"][0].__setitem__(0, 99),
        lambda sample: sample["states"][0]["rows"][0][4].__setitem__(0, 10**6),
        lambda sample: sample["tokens"].pop(),
        lambda sample: sample["states"][0]["rows"][0].pop(),
    ):
        wrong = json.loads(json.dumps(content))
        change(wrong["samples"][0])
        path.write_text(json.dumps(wrong))
        with pytest.raises(Exception, match=r"after.json is damaged"):
            read_run(damaged)


# ---- in a browser ----


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if program() is None:
        pytest.skip("no Chromium is installed: apt-get install chromium")
    with browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.fixture
def page(tab: Browser, folder: Path, tmp_path: Path) -> Browser:
    """The page of a run, open; it must have complained of nothing in the end, and asked for nothing but itself."""
    return shown(tab, tmp_path / "page.html", str(folder))


def shown(tab: Browser, out: Path, *argv: str) -> Browser:
    inspector.main([*argv, "--out", str(out)])
    tab.complaints.clear()
    tab.fetched.clear()
    tab.look(1280, 900)
    tab.open(out)
    return tab


def texts(tab: Browser, selector: str) -> list[str]:
    return tab.run(f"[...document.querySelectorAll({json.dumps(selector)})].map((node) => node.textContent)")


def put(tab: Browser, selector: str, value: str, event: str) -> None:
    tab.run(
        f"(() => {{ const node = document.querySelector({json.dumps(selector)}); node.value = {json.dumps(value)};"
        f"node.dispatchEvent(new Event({json.dumps(event)}, {{bubbles: true}})); }})()"
    )


def quiet(tab: Browser) -> None:
    """Nothing was complained of, and nothing but the file was asked for."""
    assert tab.complaints == []
    assert all(url.startswith(("file:", "data:")) for url in tab.fetched) and len(tab.fetched) <= 2, tab.fetched


def kept(folder: Path, moment: str, number: int = 0) -> dict[str, Any]:
    content = json.loads((folder / "inspect" / f"{moment}.json").read_text())
    return {**content["samples"][number], "texts": content["texts"]}


def test_steps_are_those_of_the_trajectory(page: Browser, folder: Path) -> None:
    """By click and by key, every token stands as the file says: masked, revealed, shown to the teacher, in K; and the
    figures are those of the position that is chosen."""
    put(page, "#sort", "order", "change")
    page.click("#items li:nth-child(1) button")
    assert texts(page, "#item-title") == ["Problem 0"]
    assert texts(page, ".view h3") == [" before", " after"]
    put(page, "#step", "0", "input")
    samples = [kept(folder, moment) for moment in ("before", "after")]
    states = [{state["step"]: state for state in sample["states"]} for sample in samples]
    last = max(max(sample["reveal_step"]) + 1 for sample in samples)
    for step in range(last):
        found = page.run(
            "[...document.querySelectorAll('.tokens')].map((one) => [...one.children].map((cell) =>"
            "[cell.className.split(' '), cell.textContent, cell.getAttribute('aria-label')]))"
        )
        for sample, by_step, cells in zip(samples, states, found, strict=True):
            if step not in by_step:
                continue
            rows = {row[0]: row for row in by_step[step]["rows"]}
            for place, (classes, text, label) in enumerate(cells):
                when, shown = sample["reveal_step"][place], place in by_step[step]["shown"]
                kind = (
                    "never" if when < 0 else "known" if when < step else "new" if when == step
                    else "shown" if shown else "masked"
                )  # fmt: skip
                assert kind in classes and ("shown" in classes) == shown, (step, place)
                assert ("compared" in classes) == (place in rows and rows[place][1])
                token = sample["texts"][str(sample["tokens"][place])].replace("\n", "↵").replace(" ", "␣")
                assert text == (token if kind in ("known", "new", "shown") else " " if kind == "never" else "·")
                assert ("KL" in label) == (place in rows)
        page.click("#forth") if step % 2 else page.press(".")
    assert texts(page, "#step-shown") == [f"{last} of {last}"]
    page.press(",")
    assert texts(page, "#step-shown") == [f"{last - 1} of {last}"]

    step, row = next((s["step"], row) for s in samples[0]["states"][2:] for row in s["rows"] if row[1])
    put(page, "#step", str(step), "input")
    page.click(f"#cell-0-{row[0]}")
    said = texts(page, ".view:first-child .top td")
    for rank in range(5):
        for side, ids, probabilities in (("student", row[6], row[7]), ("teacher", row[4], row[5])):
            text = said[2 * rank + (side == "teacher")]
            assert text.startswith(samples[0]["texts"][str(ids[rank])].replace("\n", "↵").replace(" ", "␣")), text
            assert abs(float(text.split()[-2]) - 100 * probabilities[rank]) < 0.06
    assert f"Position {row[0]}, step {step}" in "".join(texts(page, ".view:first-child"))
    page.press("ArrowRight")  # within the tokens, which the click has given the focus
    assert page.run("document.querySelector('[aria-selected=true]').id") == f"cell-0-{row[0] + 1}"
    page.press("End")
    assert page.run("document.querySelector('[aria-selected=true]').id") == "cell-0-47"
    quiet(page)


def test_the_list_is_filtered_and_sorted(page: Browser, folder: Path) -> None:
    """By standing, text, and figures; keys go through what is listed."""
    everything = texts(page, "#items .excerpt")
    assert len(everything) == 4 + SAMPLES and texts(page, "#count") == ["6 of 6"]
    put(page, "#show", "updates", "change")
    assert (
        all("as it was learnt" in text for text in texts(page, "#items .figure")) and len(texts(page, "#items li")) == 2
    )
    put(page, "#show", "with steps", "change")
    put(page, "#sort", "KL of the last", "change")
    kls = [float(text.rpartition("KL ")[2].split()[0]) for text in texts(page, "#items .figure")]
    assert len(kls) == 4 and kls == sorted(kls, reverse=True)
    put(page, "#show", "all", "change")
    row = json.loads((folder / "held_out_before.json").read_text())["tokens_per_step"]["4"][3]
    put(page, "#search", row["puzzle"], "input")
    assert texts(page, "#count") == ["1 of 6"]
    page.press("n")
    assert texts(page, "#item-title") == ["Problem 3"] and "Its steps were not kept." in texts(page, ".view p")
    put(page, "#search", "", "input")
    put(page, "#sort", "order", "change")
    page.click("#items li:nth-child(2) button")
    page.press("p")
    assert texts(page, "#item-title") == ["Problem 0"]
    page.press("n")
    page.press("n")
    assert texts(page, "#item-title") == ["Problem 2"]
    quiet(page)


def test_figures_follow_the_update(page: Browser, folder: Path) -> None:
    """The values that stand beside names are those of the update that is chosen; names are filtered."""
    lines = (folder / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("loss")
    losses = [float(line.split(",")[column]) for line in lines[1:] if line.split(",")[column]]
    for update, loss in ((2, losses[1]), (1, losses[0])):
        put(page, "#update", str(update), "input")
        shown = texts(page, "figure[data-name=loss] figcaption span")[0]
        assert float(shown) == pytest.approx(loss, rel=0.01)
    put(page, "#figure-filter", "KL", "input")
    assert page.run(
        "[...document.querySelectorAll('figure')].filter((one) => !one.hidden).map((one) => one.dataset.name)"
    ) == ["kl"]
    quiet(page)


def test_text_from_data_is_text(tab: Browser, damaged: Path, tmp_path: Path) -> None:
    """Markup in a prompt, a response and a token is shown as it stands, and runs nothing."""
    hostile_run(damaged)
    shown(tab, tmp_path / "page.html", str(damaged))
    put(tab, "#sort", "order", "change")
    tab.click("#items li:nth-child(1) button")
    assert texts(tab, "#prompt") == [HOSTILE]
    put(tab, "#step", "99", "input")
    assert HOSTILE.replace(" ", "␣") in texts(tab, ".tokens .cell")
    assert tab.run("document.images.length") == 0 and tab.run("typeof window.hacked") == "undefined"
    quiet(tab)


def test_narrow_dark_large_and_compared(tab: Browser, folder: Path, damaged: Path, tmp_path: Path) -> None:
    """256 tokens of a large vocabulary, of two runs: nothing is wider than the window, which may be 360 pixels wide;
    every text can be read on what is behind it, and all that takes the focus has a name."""
    large_run(damaged, 3)
    shown(tab, tmp_path / "page.html", str(folder), "--compare", str(damaged))
    put(tab, "#show", "with steps", "change")
    put(tab, "#sort", "order", "change")
    tab.click("#items li:nth-child(1) button")
    assert len(texts(tab, ".view")) == 4 and len(texts(tab, ".view:last-child .cell")) == 256
    tab.run("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    for width in (1280, 360):
        for dark in (False, True):
            tab.look(width, 900, dark=dark)
            assert tab.run("document.documentElement.scrollWidth") <= width
            assert tab.run(CONTRAST) == []
    nodes = tab.send("Accessibility.getFullAXTree")["nodes"]
    focusable = [
        node
        for node in nodes
        if any(one["name"] == "focusable" and one["value"]["value"] for one in node.get("properties", []))
        and node["role"]["value"] not in ("RootWebArea", "MenuListPopup", "option")
    ]
    assert len(focusable) > 20 and not [node for node in focusable if not node["name"]["value"].strip()]
    assert tab.run("new Set([...document.querySelectorAll('[id]')].map((one) => one.id)).size") == tab.run(
        "document.querySelectorAll('[id]').length"
    )
    tab.screenshot(tmp_path / "views.png", "#views")
    width, height = struct.unpack(">II", (tmp_path / "views.png").read_bytes()[16:24])
    assert width > 300 and height > 900  # below one another
    # The first stops of the keyboard, each of which can be seen to have the focus.
    tab.look(1280, 900)
    tab.run("document.activeElement.blur()")
    for _ in range(5):
        tab.press("Tab")
        assert tab.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    quiet(tab)
