"""Sizes of a comparison before it is paid for.

  python -m dpo_jax.winrates --plan --prompts=150 --effect=0.1

Exit codes: 0 done, 2 a value that cannot be used.
"""

import argparse
import math
import sys
from collections.abc import Sequence

from dpo_jax.interface import console
from dpo_jax.winrates import planning


def main(arguments: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m dpo_jax.winrates",
    description="Intervals and detectable effects of a number of prompts, and"
    " the prompts that an effect needs. Shares are in 0..1.",
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  add = parser.add_argument
  add("--plan", action="store_true", required=True, help="plan a comparison")
  add("--prompts", type=int, default=150, help="prompts at hand")
  add("--effect", type=float, default=0.1, help="effect to be found")
  add("--confidence", type=float, default=0.95, help="of intervals and tests")
  add("--power", type=float, default=0.8, help="chance to find the effect")
  add("--rate", type=float, default=0.5, help="win rate that is expected")
  add(
    "--split",
    type=float,
    default=0.2,
    help="prompts whose two orders disagree; 0 for one order",
  )
  add(
    "--discordant",
    type=float,
    default=0.4,
    help="prompts on which two models score differently",
  )
  add("--tests", type=int, default=1, help="temperatures that Holm corrects")
  console.add_flag(parser)
  flags = parser.parse_args(arguments)
  try:
    console.result("\n".join(_lines(flags)))
  except ValueError as error:
    console.error(str(error))
    return 2
  return 0


def _lines(flags: argparse.Namespace) -> list[str]:
  plan = planning.Plan(
    confidence=flags.confidence,
    power=flags.power,
    rate=flags.rate,
    split=flags.split,
    discordant=flags.discordant,
    tests=flags.tests,
  )
  n, effect = flags.prompts, flags.effect
  level = f"{100 * plan.confidence:g}%"
  power = f"{100 * plan.power:g}% power"
  points = f"{100 * effect:g} points"
  correction = f", Holm over {plan.tests}" if plan.tests > 1 else ""
  width = f"{100 * planning.half_width(plan, n):.1f}"
  return [
    f"With {n} prompts:",
    f"  a rate of {100 * plan.rate:g}% has a {level} interval of about"
    f" +-{width} points",
    "  smallest distance from 50% found with"
    f" {power}: {_points(planning.detectable_against_half(plan, n))}",
    "  smallest difference of two models on the same prompts found with"
    f" {power}{correction}: {_points(planning.detectable_difference(plan, n))}",
    f"Prompts needed for {points}:",
    "  as half the width of the interval:"
    f" {planning.prompts_for_width(plan, effect)}",
    f"  as distance from 50%, {power}:"
    f" {planning.prompts_against_half(plan, effect)}",
    f"  as difference of two models, {power}{correction}:"
    f" {planning.prompts_for_difference(plan, effect)}",
    f"Assumed: {100 * plan.split:g}% of prompts split between the orders,"
    f" {100 * plan.discordant:g}% scored differently by two models.",
  ]


def _points(effect: float) -> str:
  return "none" if math.isnan(effect) else f"{100 * effect:.1f} points"


if __name__ == "__main__":
  sys.exit(main())
