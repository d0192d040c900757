"""Counts the units of a cargo unit graph (standard input) that are of one package or depend on it."""

import json
import sys

graph = json.load(sys.stdin)
units = graph["units"]
name = sys.argv[1]


def is_of_package(unit):
    return f"/{name}#" in unit["pkg_id"] or f"#{name}@" in unit["pkg_id"]


dependents = {number for number, unit in enumerate(units) if is_of_package(unit)}
while True:
    more = {
        number
        for number, unit in enumerate(units)
        if any(dependency["index"] in dependents for dependency in unit["dependencies"])
    } | dependents
    if more == dependents:
        break
    dependents = more
print(len(dependents))
