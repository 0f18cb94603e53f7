"""The page: HTML, style sheet and script in one, with no reference to anything outside."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from gankern.report import chart
from gankern.report.chart import number
from gankern.report.facts import Facts, Picture, encode
from gankern.report.probe import NEAREST
from gankern.report.shown import Shown
from gankern.training import pictures
from gankern.training.presets import PRESETS

HERE = Path(__file__).parent
PIXELS = 480  # pictures of images up to this wide are enlarged without blur
SPEED = "images_per_s"
TOGETHER = (("losses", ("d_loss", "g_loss")), ("what the critic says", ("d_real", "d_fake")))  # one chart, of a single run


def page(runs: Sequence[Shown], version: str = "") -> str:
    """The whole file. `version`: of the live page, which asks its server for a newer one."""
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # The browser itself forbids any request, but to the server of a live page, and any script but the one below.
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'; base-uri 'none'; "
    policy += "form-action 'none'" + "; connect-src 'self'" * bool(version)
    live = '<p class="soft" id="live" aria-live="off">live</p>' if version else ""
    title = " / ".join(_title(run.facts) for run in runs)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width, initial-scale=1"><meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="referrer" content="no-referrer"><link rel="icon" href="data:,"><title>{_e(title)}</title>'
        f'<style>{style}</style></head>\n<body data-version="{version}">{live}'
        f"<main>{main(runs)}</main>\n<script>{script}</script></body></html>\n"
    )


def main(runs: Sequence[Shown]) -> str:
    """What stands in <main>."""
    parts = (_head, _film, _events, _scores, _curves, _near, _walk, _settings)
    return "\n".join(part(runs) for part in parts)


def _e(value: object) -> str:
    return html.escape(str(value))


def _title(facts: Facts) -> str:
    return f"{facts.run.preset} on {facts.content.get('data_name', facts.config.data)}, {number(facts.step)} steps"


def _section(name: str, title: str, body: str, words: str = "") -> str:
    words = f'<p class="soft">{words}</p>' if words else ""
    return f'<section id="{name}"><h2>{title}</h2>{words}{body}</section>' if body else ""


def _each(runs: Sequence[Shown], parts: Sequence[str], kind: str) -> str:
    """The parts of the runs beside each other, under their names if there are several; "" if none has any."""
    if not any(parts):
        return ""
    if len(runs) > 1:
        names = [_key(run, i) for i, run in enumerate(runs)]
        parts = [f"<div><h3>{name}</h3>{part or '<p>nothing</p>'}</div>" for name, part in zip(names, parts, strict=True)]
    return f'<div class="{kind}">{"".join(parts)}</div>'


def _key(run: Shown, i: int) -> str:
    """The name of a run after its colour."""
    return f'<span class="key c{i % chart.COLOURS}">{_e(run.facts.name)}</span>'


def _head(runs: Sequence[Shown]) -> str:
    facts = [_facts(run) for run in runs]
    if len(runs) == 1:
        run = runs[0].facts
        words = f"<p>{_e(PRESETS[run.run.preset].summary)}</p>" if run.run.preset in PRESETS else ""
        cells = "".join(
            f"<div><dt>{_e(name)}</dt><dd>{_e(value)}</dd></div>" for name, value in facts[0].items() if name != "preset"
        )
        notes = f'<p class="warn">{_e(runs[0].note)}</p>' if runs[0].note else ""
        return f"<header><h1>{_e(_title(run))}</h1>{words}{notes}<dl>{cells}</dl></header>"
    names = "".join(f'<th scope="col">{_key(run, i)}</th>' for i, run in enumerate(runs))
    rows = "".join(
        f'<tr><th scope="row">{_e(key)}</th>{"".join(f"<td>{_e(one[key])}</td>" for one in facts)}</tr>' for key in facts[0]
    )
    notes = "".join(f'<p class="warn">{_e(run.facts.name)}: {_e(run.note)}</p>' for run in runs if run.note)
    table = f'<div class="scroll"><table><thead><tr><td></td>{names}</tr></thead><tbody>{rows}</tbody></table></div>'
    return f"<header><h1>{len(runs)} runs compared</h1>{notes}{table}</header>"


def _facts(run: Shown) -> dict[str, str]:
    facts, content = run.facts, run.facts.content
    count = content.get(facts.noun)
    speeds = sorted(facts.curves[SPEED].values) if SPEED in facts.curves else []
    versions = content.get("versions")
    return {
        "preset": facts.run.preset,
        "data": f"{content.get('data_name', facts.config.data)}: {number(count) if isinstance(count, int) else '?'} {facts.noun} "
        f"of {'×'.join(map(str, facts.run.shape))}",
        "steps": f"{number(facts.step)} of {number(facts.config.steps)}",
        "training time": _time(facts.seconds),
        "speed (median)": f"{number(round(speeds[len(speeds) // 2]))} {facts.noun}/s" if speeds else "not logged",
        "samples from": "no checkpoint yet"
        if run.probe is None
        else f"{'averaged' if run.probe.source == 'ema' else 'last'} weights, step {number(run.probe.step)}",
        "device": str(content.get("device_used", "unknown")),
        "versions": ", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, dict) else "unknown",
    }


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.3g} s"


def _image(picture: Picture, alt: str, more: str = "", pixels: bool = False) -> str:
    kind = ' class="pixels"' if pixels and picture.width <= PIXELS else ""
    return f'<img src="{picture.uri}" width="{picture.width}" height="{picture.height}" alt="{_e(alt)}"{kind}{more}>'


def _film(runs: Sequence[Shown]) -> str:
    steps = sorted({frame.step for run in runs for frame in run.facts.frames})
    figures = []
    for run in runs:
        facts, pixels = run.facts, run.facts.noun == "images"
        name = f"{facts.name}: " if len(runs) > 1 else ""
        last = len(facts.frames) - 1
        images = "".join(
            _image(f.picture, f"generated samples after step {f.step}", f' data-step="{f.step}"' + " hidden" * (i < last), pixels)
            for i, f in enumerate(facts.frames)
        )
        if images:
            figures.append(f"<figure data-film><figcaption>{_e(name)}generated</figcaption>{images}</figure>")
    for run in runs:
        if run.facts.reals is not None:
            name = f"{run.facts.name}: " if len(runs) > 1 else ""
            image = _image(run.facts.reals, "real samples of the training data", "", run.facts.noun == "images")
            figures.append(f"<figure><figcaption>{_e(name)}real</figcaption>{image}</figure>")
    slider = ""
    if len(steps) > 1:
        slider = (
            '<div class="film"><button type="button" id="play">Play</button><input type="range" id="step" min="0" '
            f'max="{len(steps) - 1}" value="{len(steps) - 1}" aria-label="training step of the samples" '
            f'data-steps="{json.dumps(steps)}"><output id="step-now" for="step">step {number(steps[-1])}</output></div>'
        )
    return _section(
        "samples",
        "Samples over time",
        f'{slider}<div class="pictures" style="--n: {max(len(runs), 2)}">{"".join(figures)}</div>' if figures else "",
    )


def _events(runs: Sequence[Shown]) -> str:
    parts = []
    for run in runs:
        rows = "".join(
            f'<li><span class="warn">step {_e(row.get("step", "?"))}: {_e(row["kind"])}</span>: {_e(row.get("saw", ""))}'
            f"<br>To try: {_e(row.get('try', 'nothing known'))}</li>"
            for row in run.facts.events
        )
        parts.append(f"<ul>{rows}</ul>" if rows else "")
    return _section("health", "Health", _each(runs, parts, "wide"))


def _scores(runs: Sequence[Shown]) -> str:
    parts = []
    for run in runs:
        scores = run.probe.scores if run.probe else None
        if scores is None:
            parts.append("")
            continue
        counts = f"{number(len(scores.real))} real, {number(len(scores.fake))} generated"
        named = [("real", scores.real), ("generated", scores.fake)]
        parts.append(chart.histogram(f"critic's {scores.name}", "score", named, counts))
    words = (
        "Of the critic of the last checkpoint, in evaluation mode. Far apart: it tells them easily; one upon the other: it cannot."
    )
    return _section("scores", "What the critic gives real and generated samples", _each(runs, parts, "charts"), words)


def _curves(runs: Sequence[Shown]) -> str:
    keys = list(dict.fromkeys(key for run in runs for key in run.facts.curves))
    charts = []
    if len(runs) == 1:
        logged = runs[0].facts.curves
        for title, group in TOGETHER:
            charts.append(chart.curves(title, {i: logged[key] for i, key in enumerate(group) if key in logged}))
            keys = [key for key in keys if key not in group]
    for key in sorted(keys, key=SPEED.__eq__):  # that comes last
        found = {i: run.facts.curves[key] for i, run in enumerate(runs) if key in run.facts.curves}
        title = " / ".join(dict.fromkeys(curve.name for curve in found.values()))
        if len(runs) > 1:
            found = {i: curve._replace(name=runs[i].facts.name) for i, curve in found.items()}
        charts.append(chart.curves(title, found))
    names = dict.fromkeys(run.facts.config.objective for run in runs)
    words = f"The values to expect: {', '.join(f'<code>gankern explain {_e(name)}</code>' for name in names)}."
    body = f'<div class="charts">{"".join(charts)}</div>' if any(charts) else ""
    return _section("curves", "Losses, metrics and speed", body, words)


def _near(runs: Sequence[Shown]) -> str:
    parts, found = [], [run.probe.near if run.probe else None for run in runs]
    for near in found:
        if near is None:
            parts.append("")
            continue
        verdict = f"Median distance of generated samples to the nearest of {number(near.searched)} training samples: "
        verdict += f"{near.fake:.3g}; of training samples to the nearest other one: {near.real:.3g}."
        image = ""
        if near.picture is not None:
            image = _image(_picture(near.picture), "generated samples, and below each the training images nearest to it", "", True)
        parts.append(f"<figure><figcaption>{verdict}</figcaption>{image}</figure>")
    words = "Has it learned the data by heart? A copy has a distance near 0 (Euclidean, between samples as the networks see them)."
    if any(near is not None and near.picture is not None for near in found):
        words += f" First row: generated; below each its {NEAREST} nearest training images."
    return _section("neighbours", "Nearest training samples", _each(runs, parts, "wide"), words)


def _walk(runs: Sequence[Shown]) -> str:
    parts = []
    for run in runs:
        way = run.probe.walk if run.probe else None
        if run.probe is None or way is None or not way.isfinite().all():
            parts.append("")
        elif way.dim() == 5:
            picture = _picture(pictures.grid(way.flatten(0, 1), way.shape[1]))
            alt = "rows of samples that change from one latent vector to another"
            parts.append(f"<figure>{_image(picture, alt, '', True)}</figure>")
        else:
            parts.append(chart.paths(way, run.probe.points) if way.shape[-1] == 2 else "")
    words = "Each way leads from one random latent vector to another, in equal steps. Smooth changes are good; jumps are not."
    return _section("interpolation", "Between latent vectors", _each(runs, parts, "wide"), words)


def _picture(picture: Tensor) -> Picture:
    from PIL import Image

    array = picture.numpy()
    return encode(Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array))


def _settings(runs: Sequence[Shown]) -> str:
    settings = [run.facts.config.to_json() for run in runs]
    usual = [PRESETS[r.facts.run.preset].config.to_json() if r.facts.run.preset in PRESETS else {} for r in runs]

    def rows(keys: Sequence[str], mark: bool) -> str:
        lines = []
        for key in keys:
            cells = "".join(
                f"<td{' class=changed' if mark and u and u.get(key) != s[key] else ''}>{_e(_plain(s[key]))}</td>"
                for s, u in zip(settings, usual, strict=True)
            )
            lines.append(f'<tr><th scope="row">{_e(key)}</th>{cells}</tr>')
        return "".join(lines)

    names = "".join(f'<th scope="col">{_e(run.facts.name)}</th>' for run in runs)
    head = f"<thead><tr><td></td>{names}</tr></thead>" if len(runs) > 1 else ""
    body = ""
    if len(runs) > 1:
        apart = [key for key in settings[0] if len({json.dumps(s[key]) for s in settings}) > 1]
        body = f'<h3>Settings that differ</h3><div class="scroll"><table>{head}<tbody>{rows(apart, False)}</tbody></table></div>'
        body = body if apart else "<p>All settings are the same.</p>"
    body += (
        '<details id="all-settings"><summary>All settings, in bold those that differ from the preset</summary><div class="scroll">'
        f"<table>{head}<tbody>{rows(list(settings[0]), True)}</tbody></table></div></details>"
    )
    commands = "".join(f"<pre><code>{_e(r.facts.resume())}</code></pre>" for r in runs if r.facts.resume())
    return _section("settings", "Settings", body + (f"<p>To go on with the training:</p>{commands}" if commands else ""))


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
