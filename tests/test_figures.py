"""Style and colors, and plots of known rows."""

import itertools

import judged
import matplotlib
import matplotlib.colors
import matplotlib.style
import numpy as np
import PIL.Image
import pytest

from dpo_jax import winrates
from dpo_jax.report import figures
from dpo_jax.report.figures import plots, style
from dpo_jax.winrates import rates

# Machado, Oliveira and Fernandes, A physiologically-based model for simulation
# of color vision deficiency, 2009: severity 1.0, on linear RGB.
VISION = {
  "normal": "1 0 0 0 1 0 0 0 1",
  "protanopia": "0.152286 1.052583 -0.204868 0.114503 0.786281 0.099216"
  " -0.003882 -0.048116 1.051998",
  "deuteranopia": "0.367322 0.860646 -0.227968 0.280085 0.672501 0.047413"
  " -0.011820 0.042940 0.968881",
  "tritanopia": "1.255528 -0.076749 -0.178779 -0.078411 0.930809 0.147602"
  " 0.004733 0.691367 0.303900",
}
TO_XYZ = (
  "0.4124564 0.3575761 0.1804375 0.2126729 0.7151522 0.0721750"
  " 0.0193339 0.1191920 0.9503041"
)


def matrix(text):
  return np.array(text.split(), float).reshape(3, 3)


def lab(color, vision):
  """CIE L*a*b* of an sRGB color as some eyes see it."""
  rgb = np.asarray(matplotlib.colors.to_rgb(color))
  linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
  seen = np.clip(matrix(VISION[vision]) @ linear, 0, 1)
  xyz = matrix(TO_XYZ)
  x, y, z = np.cbrt(np.maximum(xyz @ seen / xyz.sum(axis=1), 0.008856))
  return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def cycle():
  colors = matplotlib.rcParams["axes.prop_cycle"].by_key()["color"]
  return [f"#{color.lstrip('#')}" for color in colors]


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("vision", sorted(VISION))
def test_colors_are_distinct_under_color_vision_deficiencies(vision, dark):
  with style.style(dark):
    colors = cycle()
  # About 2.3 is just noticeable; lines of three models need much more.
  for one, other in itertools.combinations(colors[:3], 2):
    assert np.linalg.norm(lab(one, vision) - lab(other, vision)) > 25
  for one, other in itertools.combinations(colors, 2):
    assert np.linalg.norm(lab(one, vision) - lab(other, vision)) > 9


def test_the_style_files_serve_other_figures():
  with style.style():
    assert cycle() == list(style.COLORS)
    assert matplotlib.rcParams["pdf.fonttype"] == 42
  with matplotlib.style.context(
    ["dpo_jax.report.figures.style", "dpo_jax.report.figures.dark"]
  ):
    assert matplotlib.rcParams["font.size"] == 7.5
    own = cycle()
  with style.style(dark=True):
    assert own == cycle()


def rows(n=60):
  metrics = {
    "loss": 0.7,
    "grad_norm": 1.0,
    "learning_rate": 1e-3,
    "rewards/accuracies": 0.75,
    "rewards/chosen": 0.25,
    "rewards/rejected": -0.5,
    "rewards/margins": 0.75,
  }
  train = [{"step": step} | metrics for step in range(1, n)]
  return [
    *train,
    {"step": n, "eval_rewards/accuracies": 0.5, "eval_items": 100},
  ]


def axes_of(plot, *arguments, **keywords):
  with style.style():
    return plot(*arguments, **keywords).axes


def test_a_column_for_each_run_and_no_panel_without_rows():
  plain = [{"step": step, "loss": 1 / step} for step in range(1, 9)]
  axes = axes_of(plots.training_curves, {"sft": plain, "dpo": rows()})
  titles = [a.get_title(loc="left") for a in axes]
  assert titles == [
    "SFT: loss",
    "DPO: loss",
    "DPO: gradient norm",
    "DPO: learning rate",
    "DPO: reward accuracy",
  ]
  x, y = axes[0].lines[0].get_data()
  assert list(x) == list(range(1, 9))
  assert list(y) == pytest.approx([1 / step for step in range(1, 9)])
  labelled = [a for a in axes if a.get_xlabel() == "step"]
  assert labelled == [axes[0], axes[4]]


def test_margins_are_chosen_less_rejected():
  (axes,) = axes_of(plots.reward_margins, rows())
  means = [
    float(np.mean(line.get_ydata()))
    for line in axes.lines
    if line.get_linewidth() > 1
  ]
  assert means == pytest.approx([0.25, -0.5, 0.75])


def test_held_out_rewards_are_rings_with_a_key():
  last = {"step": 60, "eval_rewards/chosen": 0.2, "eval_rewards/rejected": -0.4}
  with style.style():
    figure = plots.reward_margins([*rows(), last])
  (legend,) = figure.legends
  keys = [text.get_text() for text in legend.get_texts()]
  assert keys == ["chosen", "rejected", "margin", "held out"]
  rings = [x for x in figure.axes[0].lines if x.get_marker() == "o"]
  assert [list(ring.get_ydata()) for ring in rings] == [[0.2], [-0.4]]
  for line in (*rings, legend.legend_handles[-1]):
    assert line.get_markerfacecolor() == line.get_linestyle().lower() == "none"


def test_accuracy_has_a_wilson_interval():
  (axes,) = axes_of(plots.reward_accuracy, rows(), confidence=0.95)
  (bars,) = [c for c in axes.containers if c.has_yerr]
  ((_, low), (_, high)) = bars[2][0].get_segments()[0]
  # Wilson, 50 of 100, by SciPy's binomtest: [0.4038, 0.5962].
  assert (low, high) == pytest.approx((40.38, 59.62), abs=0.01)


def test_win_rates_by_length():
  bins = [
    rates.LengthBin("dpo", 0.75, -20.0, 10, 0.25, 0.1, 0.5),
    rates.LengthBin("dpo", 0.75, 30.0, 10, 0.75, 0.5, 0.9),
  ]
  (axes,) = axes_of(plots.win_rate_by_length, bins)
  (bars,) = axes.containers
  assert list(bars[0].get_xdata()) == [-20.0, 30.0]
  assert list(bars[0].get_ydata()) == [25.0, 75.0]
  with style.style():
    color = matplotlib.colors.to_hex(bars[0].get_color())
  assert color.upper() == style.COLORS[2]


def rate(model, step):
  calls = judged.scored([1] * 4, model=model, step=step)
  return winrates.win_rates(calls, winrates.Settings())[0]


@pytest.mark.parametrize("count", [1, 9])
def test_win_rates_of_any_number_of_models_and_steps(count):
  finals = [rate(f"model {i} $x$", None) for i in range(count)]
  (axes,) = axes_of(plots.win_rate_by_temperature, finals)
  assert len(axes.containers) == count
  steps = [rate("dpo", 100 * i) for i in range(count)]
  (axes,) = axes_of(plots.win_rate_by_step, steps)
  (bars,) = axes.containers
  assert list(bars[0].get_xdata()) == [100 * i for i in range(count)]
  assert list(bars[0].get_ydata()) == [100.0] * count


def test_a_figure_is_png_and_pdf_of_one_size(tmp_path):
  figure = figures.Figure("x.png", [], lambda: plots.reward_margins(rows()), "")
  path = tmp_path / "margins.png"
  with matplotlib.rc_context({"font.size": 23.0}):
    figure.save(path)
    # A user's own settings neither change a figure nor are changed.
    assert matplotlib.rcParams["font.size"] == 23.0
  with PIL.Image.open(path) as image:
    assert image.size == (975, 690)
  assert path.read_bytes() == figure.png()
  # 3.25 by 2.3 inches of 72 points.
  pdf = path.with_suffix(".pdf").read_bytes()
  assert pdf.startswith(b"%PDF-")
  assert b"/MediaBox [ 0 0 234 165.6 ]" in pdf


def test_a_mask_is_colored_by_the_part_of_the_query():
  # Prompt, chosen, rejected: the responses attend to the prompt and themselves.
  mask = np.array([[1, 0, 0], [1, 1, 0], [1, 0, 1]], bool)
  (axes,) = axes_of(plots.packing_mask, mask, np.array([0, 1, 2]), "abc")
  image = np.asarray(axes.images[0].get_array())
  for query, look in enumerate((0, 3, 4)):
    color = matplotlib.colors.to_rgb(style.COLORS[look])
    for key in range(3):
      expected = color if mask[query, key] else (0.96,) * 3
      assert image[query, key] == pytest.approx(expected)


def test_shards_are_drawn_with_their_devices():
  half = {0: slice(None, 2), 1: slice(2, None)}
  held = {i: (half[i // 2], slice(None)) for i in range(4)}
  axes = axes_of(plots.sharding, {"kernel": ((4, 6), held)})
  assert [text.get_text() for text in axes[0].texts] == ["0, 1", "2, 3"]
  corners = [(bar.get_y(), bar.get_height()) for bar in axes[0].patches]
  assert corners == [(0, 2), (2, 2)]
