"""The house style, its colours, and what is drawn from known rows."""

import itertools

import matplotlib
import matplotlib.colors
import matplotlib.style
import numpy as np
import PIL.Image
import pytest
import reported

from dpo_jax import winrates
from dpo_jax.report import figures
from dpo_jax.report.figures import layout, runs, style
from dpo_jax.winrates import rates

# Machado, Oliveira and Fernandes, A physiologically-based model for simulation
# of color vision deficiency, 2009: severity 1.0, on linear RGB.
VISION = {
  "normal": np.eye(3),
  "protanopia": [
    [0.152286, 1.052583, -0.204868],
    [0.114503, 0.786281, 0.099216],
    [-0.003882, -0.048116, 1.051998],
  ],
  "deuteranopia": [
    [0.367322, 0.860646, -0.227968],
    [0.280085, 0.672501, 0.047413],
    [-0.011820, 0.042940, 0.968881],
  ],
  "tritanopia": [
    [1.255528, -0.076749, -0.178779],
    [-0.078411, 0.930809, 0.147602],
    [0.004733, 0.691367, 0.303900],
  ],
}
TO_XYZ = np.array(
  [
    [0.4124564, 0.3575761, 0.1804375],
    [0.2126729, 0.7151522, 0.0721750],
    [0.0193339, 0.1191920, 0.9503041],
  ]
)


def lab(color, vision):
  """CIE L*a*b* of an sRGB colour as some eyes see it."""
  rgb = np.asarray(matplotlib.colors.to_rgb(color))
  linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
  seen = np.clip(np.asarray(VISION[vision]) @ linear, 0, 1)
  white = TO_XYZ.sum(axis=1)
  x, y, z = np.cbrt(np.maximum(TO_XYZ @ seen / white, 0.008856))
  return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def cycle():
  colors = matplotlib.rcParams["axes.prop_cycle"].by_key()["color"]
  return [f"#{color.lstrip('#')}" for color in colors]


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("vision", sorted(VISION))
def test_colours_are_told_apart_by_all_eyes(vision, dark):
  with style.style(dark):
    colors = cycle()
  # About 2.3 is just noticeable; lines of three models need much more.
  for one, other in itertools.combinations(colors[:3], 2):
    assert np.linalg.norm(lab(one, vision) - lab(other, vision)) > 25
  for one, other in itertools.combinations(colors, 2):
    assert np.linalg.norm(lab(one, vision) - lab(other, vision)) > 9


def test_the_style_files_are_those_of_figures_of_ones_own():
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
  train = [
    {
      "step": step,
      "loss": 0.7,
      "grad_norm": 1.0,
      "learning_rate": 1e-3,
      "rewards/accuracies": 0.75,
      "rewards/chosen": 0.25,
      "rewards/rejected": -0.5,
      "rewards/margins": 0.75,
    }
    for step in range(1, n)
  ]
  held = {"step": n, "eval_rewards/accuracies": 0.5, "eval_items": 100}
  return [*train, held]


def drawn(monkeypatch, draw, *arguments, **keywords):
  """The axes of a figure that `draw` makes, without writing it."""
  kept = []

  def keep(figure, path, data):
    kept.append(figure)
    return path

  monkeypatch.setattr(style, "save", keep)
  draw(*arguments, "unused.png", **keywords)
  return kept[0].axes


def test_a_column_for_each_run_and_no_panel_without_rows(monkeypatch):
  plain = [{"step": step, "loss": 1 / step} for step in range(1, 9)]
  axes = drawn(monkeypatch, runs.training_curves, {"sft": plain, "dpo": rows()})
  titles = [a.get_title(loc="left") for a in axes if a.axison]
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
  assert labelled == [axes[0], axes[7]]


def test_margins_are_chosen_less_rejected(monkeypatch):
  (axes,) = drawn(monkeypatch, runs.reward_margins, rows())
  means = [
    float(np.mean(line.get_ydata()))
    for line in axes.lines
    if line.get_linewidth() > 1
  ]
  assert means == pytest.approx([0.25, -0.5, 0.75])


def test_accuracy_has_a_wilson_interval(monkeypatch):
  (axes,) = drawn(monkeypatch, runs.reward_accuracy, rows(), confidence=0.95)
  (bars,) = [c for c in axes.containers if c.has_yerr]
  ((_, low), (_, high)) = bars[2][0].get_segments()[0]
  # Wilson, 50 of 100, by SciPy's binomtest: [0.4038, 0.5962].
  assert (low, high) == pytest.approx((40.38, 59.62), abs=0.01)


def test_lengths_are_drawn_where_they_are(monkeypatch):
  bins = [
    rates.LengthBin("dpo", 0.75, -20.0, 10, 0.25, 0.1, 0.5),
    rates.LengthBin("dpo", 0.75, 30.0, 10, 0.75, 0.5, 0.9),
  ]
  (axes,) = drawn(monkeypatch, figures.win_rate_by_length, bins)
  (bars,) = axes.containers
  assert list(bars[0].get_xdata()) == [-20.0, 30.0]
  assert list(bars[0].get_ydata()) == [25.0, 75.0]
  with style.style():
    color = matplotlib.colors.to_hex(bars[0].get_color())
  assert color.upper() == style.COLORS[2]


def test_a_figure_is_png_and_pdf_of_one_size(tmp_path):
  path = figures.reward_margins(rows(), tmp_path / "margins.png")
  with PIL.Image.open(path) as image:
    assert image.size == (975, 690)
  data = (tmp_path / "margins.pdf").read_bytes()
  assert data.startswith(b"%PDF-")
  # 3.25 by 2.3 inches of 72 points.
  assert b"/MediaBox [ 0 0 234 165.6 ]" in data
  figures.reward_margins(rows(), path)
  assert (tmp_path / "margins.pdf").read_bytes() == data
  assert sorted(p.name for p in tmp_path.iterdir()) == [
    "margins.pdf",
    "margins.png",
  ]


def test_an_svg_is_of_one_theme_and_the_same_every_time(tmp_path):
  rate = winrates.win_rates(
    [
      reported.verdict(
        reported.response("dpo", None, 0.7, "p"), "model_first", "model"
      )
    ],
    winrates.Settings(),
  )
  svgs = [
    figures.win_rate_by_temperature(rate, tmp_path / "x.svg", dark=dark)
    .read_text()
    .lower()
    for dark in (False, True, False)
  ]
  assert svgs[0] == svgs[2]
  assert [path.name for path in tmp_path.iterdir()] == ["x.svg"]
  light, dark = svgs[:2]
  # DPO's color of each theme, and the labels'; nothing is painted white.
  for svg, has, lacks in (
    (light, ("#d55e00", "#222222"), ("#f08a3c", "#ebe7de", "#ffffff")),
    (dark, ("#f08a3c", "#ebe7de"), ("#d55e00", "#222222", "#ffffff")),
  ):
    assert all(color in svg for color in has)
    assert not any(color in svg for color in lacks)
    assert figures.fingerprint(figures.points(rate)) in svg
    assert "dc:date" not in svg
    assert 'width="234pt" height="165.6pt"' in svg


def test_a_mask_is_coloured_by_who_sees():
  # Prompt, chosen, rejected: the responses see the prompt and themselves.
  mask = np.array([[1, 0, 0], [1, 1, 0], [1, 0, 1]], bool)
  image = layout.mask_image(mask, np.array([0, 1, 2]))
  expected = {
    place: matplotlib.colors.to_rgb(style.COLORS[look])
    for look, places in {
      0: [(0, 0)],
      3: [(1, 0), (1, 1)],
      4: [(2, 0), (2, 2)],
    }.items()
    for place in places
  }
  for row in range(3):
    for column in range(3):
      color = expected.get((row, column), (0.96,) * 3)
      assert image[row, column] == pytest.approx(color)


def test_a_mask_of_another_size_is_refused(tmp_path):
  with pytest.raises(ValueError, match="must be of 3 tokens"):
    figures.packing_mask(np.eye(2), np.zeros(2), "abc", tmp_path / "m.png")


def test_parts_of_an_array_are_drawn_with_their_devices(monkeypatch):
  half = {0: slice(None, 2), 1: slice(2, None)}
  held = {i: (half[i // 2], slice(None)) for i in range(4)}
  axes = drawn(monkeypatch, figures.sharding, {"kernel": ((4, 6), held)})
  assert [text.get_text() for text in axes[0].texts] == ["0, 1", "2, 3"]
  corners = [(bar.get_y(), bar.get_height()) for bar in axes[0].patches]
  assert corners == [(0, 2), (2, 2)]
  with pytest.raises(ValueError, match="must have two axes"):
    drawn(monkeypatch, figures.sharding, {"bias": ((4,), {})})
