"""Whether the rules of a quantisation scheme fit the products of a model."""

from __future__ import annotations

import re

from atomc.models.deepseek_v4.config import DeepseekV4Config
from atomc.models.deepseek_v4.promises import products_of, regions_of
from atomc.passes.scheme import Scheme, SchemeError
from atomc.recipes import joined


def check_rules(scheme: Scheme, config: DeepseekV4Config) -> None:
    """Whether each rule decides for some product of the model; a rule that decides nothing is a mistake in it."""
    products = dict.fromkeys(product for region in regions_of(config) for product in products_of(region))
    decided = {found[0] for p in products if (found := scheme.rule(p.kind, p.paths)) is not None}
    for number, rule in enumerate(scheme.rules, start=1):
        of_kind = [p for p in products if p.kind == rule.op]
        fits = [joined(p.paths) for p in of_kind if rule.fits(p.kind, p.paths)]
        touched = [joined(p.paths) for p in of_kind if any(re.fullmatch(rule.path, path) for path in p.paths)]
        where = f"scheme {scheme.name}, rule {number} (path {rule.path!r})"
        if half := [name for name in touched if name not in fits]:
            raise SchemeError(f"{where}: {half[0]} is one product; a rule must fit all of its weights, or none.")
        if number not in decided:
            known = ", ".join(joined(p.paths) for p in of_kind)
            why = f"an earlier rule decides for {', '.join(fits)}" if fits else f"the model's {rule.op} are {known}"
            raise SchemeError(f"{where} decides nothing: {why}.")
