"""The page of the report: sections of plain HTML around the figures, with nothing loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from calibration.document import Sensitivity
from engines.manifest import Manifest
from engines.setting_entry import SettingEntry
from tmpdiff_export.display import departures, interval
from tmpdiff_export.report import sections
from tmpdiff_export.report.fit import fit
from tmpdiff_export.report.gram import gradient, gram_section
from tmpdiff_export.report.guard import guard_section
from tmpdiff_export.report.latency import latency
from tmpdiff_export.report.pictures import Row, palette, pictures_section
from tmpdiff_export.report.scores import scores
from tmpdiff_export.report.svg import SHADES
from tmpdiff_export.report.validation import validation

STYLE = """
:root{color-scheme:light dark;--paper:#fdfdfc;--ink:#1d2329;--muted:#66707a;--line:#d9dde1;--soft:#f1f3f5;
--loss:#a4121f;--lossback:#fdeaea;LIGHT}
@media (prefers-color-scheme:dark){:root{--paper:#15181c;--ink:#e6e9ec;--muted:#98a2ac;--line:#363d45;--soft:#20252b;
--loss:#ff9a94;--lossback:#3a1b1d;DARK}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1.2rem;max-width:72rem;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;overflow-wrap:break-word}
h1{font-size:1.7rem;line-height:1.2;margin:.2rem 0}
h2{font-size:1.25rem;margin:2.6rem 0 .3rem;padding-top:.6rem;border-top:1px solid var(--line)}
h3{font-size:1rem;margin:1.2rem 0 .4rem}
p{margin:.4rem 0;max-width:48rem}.lead,.note,figcaption{color:var(--muted)}.note,figcaption{font-size:.875rem}
nav{font-size:.9rem;margin:.8rem 0}nav a{color:inherit;margin-right:.9rem;white-space:nowrap}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.7rem;margin:1rem 0}
.tile{background:var(--soft);border-radius:.5rem;padding:.6rem .8rem;font-size:.875rem;color:var(--muted)}
.tile b{display:block;font-size:1.35rem;color:var(--ink);line-height:1.3}
.loss{border-left:.3rem solid var(--loss);background:var(--lossback);color:var(--loss);padding:.6rem .9rem;
border-radius:.2rem;font-weight:600;margin:1rem 0}
.scroll{overflow-x:auto;margin:.7rem 0}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .6rem;text-align:right;border-bottom:1px solid var(--line);vertical-align:middle;white-space:nowrap}
th:first-child,td:first-child{text-align:left;padding-left:.2rem}th{color:var(--muted);font-weight:600}
th.left,td.left{text-align:left}td.left{white-space:normal;min-width:13rem}code{white-space:nowrap}td.wrap{white-space:normal;min-width:20rem;text-align:left}
.scroll :is(th,td):first-child{position:sticky;left:0;background:var(--paper);z-index:1}
tr.chosen td,.scroll tr.chosen td:first-child{background:var(--soft);font-weight:600}td small{display:block;line-height:1.1}tr.winner td{color:var(--loss);font-weight:600}
dl{display:grid;grid-template-columns:minmax(7rem,auto) 1fr;gap:.25rem 1rem;font-size:.9rem}
dt{color:var(--muted)}dd{margin:0;min-width:0;overflow-wrap:anywhere}
.strip{display:flex;gap:1px}.strip i{flex:1 1 0;min-width:0;height:1.1rem;background:var(--c)}
.big i{height:2.6rem}.strip i:first-child{border-radius:.25rem 0 0 .25rem}.strip i:last-child{border-radius:0 .25rem .25rem 0}
.reused{--up:repeating-linear-gradient(135deg,var(--muted) 0 1px,transparent 1px 4px);outline:1px solid var(--muted);outline-offset:-1px}
.strip .reuse0,.dot.reuse0{background:repeating-linear-gradient(var(--muted) 0 1px,var(--paper) 1px 4px)}
.strip .reuse1,.dot.reuse1{background:var(--up) var(--paper)}
.strip .reuse2,.dot.reuse2{background:var(--up),repeating-linear-gradient(45deg,var(--muted) 0 1px,var(--paper) 1px 4px)}
.axis{display:flex;gap:1px;font-size:.75rem;color:var(--muted)}.axis span{flex:1 1 0;min-width:0;overflow:visible;
white-space:nowrap;text-align:center;display:flex;justify-content:center}
td .strip{width:10rem;margin:1px 0}td .strip i{height:.7rem}td .strip i:is(:first-child,:last-child){border-radius:0}
.key{display:inline-block;margin-right:1rem;white-space:nowrap}
.dot{display:inline-block;width:.75em;height:.75em;border-radius:.15em;margin-right:.4em;background:var(--c)}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,22rem),1fr));gap:1.2rem;align-items:start}
figure{margin:.6rem 0;max-width:36rem}figure svg{display:block;width:100%;height:auto}
svg *{stroke-linejoin:round;stroke-linecap:butt}
.bar{height:.8rem;min-width:2px;background:var(--p0);border-radius:.15rem}.bar.all{background:var(--muted)}
.drawn{display:grid;gap:.7rem;grid-template-columns:repeat(auto-fit,minmax(min(46%,9rem),1fr))}
.drawn figure{margin:0;max-width:18rem}.drawn img{display:block;width:100%;height:auto;margin-bottom:2px;border-radius:.2rem}
.ramp{display:inline-block;width:6rem;height:.7em;margin:0 .4em;background:linear-gradient(to right,RAMP)}
.ramp.correlation{width:9rem;border:1px solid var(--line);background:linear-gradient(to right,CORRELATION)}
.matrices{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,16rem),1fr));gap:.4rem 1.2rem}
.matrices figure{max-width:21rem}
:is([aria-label=guard],[aria-label=validation]) td:first-child{white-space:normal;min-width:9.5rem}
td.counted{min-width:8rem}.dots{display:flex;flex-wrap:wrap;gap:2px;max-width:9rem;padding:2px 0}
.dots i{width:.5rem;height:.5rem;border-radius:50%;background:var(--loss)}
ul{margin:.4rem 0;padding-left:1.2rem;max-width:48rem;font-size:.9rem}
"""


def page(manifest: Manifest, setting: SettingEntry, found: Sensitivity, rows: Sequence[Row] = ()) -> str:
    """The whole report as one HTML document that loads and runs nothing.

    Args:
        manifest: of the bundle that was calibrated.
        setting: its setting that was.
        found: its sensitivity document.
        rows: pictures to show, from `pictures.draw`.
    """
    parts = (
        ("what", "What this is", sections.what(manifest, setting, found)),
        ("schedule", "The schedule", sections.schedule(found)),
        ("precisions", "The precisions", sections.precisions(manifest, found)),
        ("scores", "How much each step suffers", scores(found)),
        ("gram", "How errors of steps add up", gram_section(found)),
        ("fit", "Predicted against measured error", fit(found)),
        ("guard", "The guard: candidates beside each other", guard_section(found)),
        ("pareto", "Error against latency", latency(found)),
        ("validation", "Validation: the schedule and simpler ones", validation(found)),
        ("cost", "What the calibration cost", sections.cost(found)),
        ("pictures", "Pictures", pictures_section(rows, found.precisions[0])),
    )
    title = f"TMPDiff calibration: {manifest.model.pipeline_class}, {found.num_steps} steps"
    body = "\n".join(f'<section id="{name}">\n<h2>{heading}</h2>\n{text}\n</section>' for name, heading, text in parts)
    links = "".join(f'<a href="#{name}">{heading.partition(":")[0]}</a> ' for name, heading, _ in parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:">\n<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_style()}</style>\n</head>\n<body>\n<header>\n<h1>{escape(title)}</h1>\n"
        f"{_headline(found)}\n<nav>{links}</nav>\n</header>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _style() -> str:
    light, dark = (";".join(f"--p{k}:{shade[side]}" for k, shade in enumerate(SHADES)) for side in (0, 1))
    ramp = ",".join(f"rgb({r},{g},{b})" for r, g, b in palette()[::51].tolist())
    found = STYLE.replace("LIGHT", light).replace("DARK", dark)
    return found.replace("RAMP", ramp).replace("CORRELATION", gradient())


def _headline(found: Sensitivity) -> str:
    chosen, reference = found.chosen, escape(found.precisions[0])
    latency = found.predicted_latency
    tiles = [
        (f"{latency:.3f}", f"mean step latency / {reference}"),
        (f"{1 / latency:.2f}&times;", f"speed-up over {reference}"),
    ]
    if chosen:
        _, _, bounds = interval(chosen.typical, ".1e").partition(" ")
        tiles.append((f"{chosen.typical.value:.2e}", f"typical error on validation prompts {bounds}"))
        if chosen.departures:
            counted, _, bounds = departures(chosen.departures).partition(" [")
            tiles.append((counted, f"validation prompts departed [{bounds}"))
        if chosen.ssim is not None:
            tiles.append((f"{chosen.ssim:.4f}", f"SSIM to {reference}'s pictures"))
    else:
        tiles.append((f"{found.predicted_error:.2e}", "E predicted, not validated"))
    tiles.append((f"{found.search_calls:,}", f"denoiser calls for the scores; a full sweep: {found.sweep_calls:,}"))
    text = '<div class="tiles">' + "".join(f'<div class="tile"><b>{b}</b>{t}</div>' for b, t in tiles) + "</div>"
    if found.losses:
        text += (
            f'<div class="loss" role="note">On the validation prompts this schedule loses to: '
            f"{escape(', '.join(row.name for row in found.losses))}. Each is no slower and has less typical error, beyond the "
            "95 % interval.</div>"
        )
    elif chosen is None:
        text += '<div class="loss" role="note">This schedule was not run on validation prompts.</div>'
    return text
