"""Tables and pictures of a study's rows, in its folder: ``STUDY.md``, ``STUDY-accuracy.png``, ``STUDY-spectrum.png``.

Intervals are of 95 %, by Student's distribution over seeds. Differences between two methods are taken seed by seed:
runs with the same seed see the same records in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from evidence.configuration import EvidenceError, Study, Variant
from evidence.data import load
from evidence.runs import BASE, chosen_rate, read_rows, validation
from fura_vlm.tables import Table


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with half of its interval, which is None of fewer than two."""

    mean: float
    half: float | None
    number: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        from scipy.stats import t

        n = len(values)
        half = t.ppf(0.975, n - 1) * stdev(values) / math.sqrt(n) if n > 1 else None
        return cls(mean(values), None if half is None else float(half), n)

    def __str__(self) -> str:
        return f"{self.mean:.1f}" if self.half is None else f"{self.mean:.1f} ± {self.half:.1f}"

    def signed(self) -> str:
        """As a difference; bold if the interval does not contain 0."""
        if self.half is None:
            return f"{self.mean:+.1f}"
        text = f"{self.mean:+.1f} ± {self.half:.1f}"
        return f"**{text}**" if abs(self.mean) > self.half else text


@dataclass
class Results:
    """The rows of a study that belong to its present settings.

    Args:
        base: the row of the base, or None.
        search: of each method its rows with ``search_seeds``.
        rates: of each method the learning rate chosen, or None while its search is not done.
        best: of each method its rows with ``seeds`` at that rate, by seed.
    """

    study: Study
    base: dict | None
    search: dict[str, list[dict]]
    rates: dict[str, float | None]
    best: dict[str, dict[int, dict]]

    @property
    def rows(self) -> list[dict]:
        return [*([self.base] if self.base else []), *(row for rows in self.search.values() for row in rows),
                *(row for rows in self.best.values() for row in rows.values())]  # fmt: skip


def fingerprint(study: Study) -> str:
    """Of the study's data."""
    return load(study.folder / "data.pt").fingerprint


def results(study: Study, rows: list[dict], data: str) -> Results:
    """Sorts rows; those of other settings are left out."""
    of = {variant.name: study.settings(variant, data) for variant in study.methods} | {BASE: study.settings(None, data)}
    rows = [row for row in rows if of.get(row["variant"]) == row["settings"]]
    rates = {variant.name: chosen_rate(study, variant, rows, of[variant.name]) for variant in study.methods}
    found = Results(study, next((row for row in rows if row["variant"] == BASE), None), {}, rates, {})
    for variant in study.methods:
        mine = [row for row in rows if row["variant"] == variant.name]
        found.search[variant.name] = [row for row in mine if row["seed"] in study.search_seeds]
        found.best[variant.name] = {
            row["seed"]: row for row in mine if row["seed"] in study.seeds and row["rate"] == rates[variant.name]
        }
    return found


def reached(row: dict, sets: Sequence[str]) -> float:
    """The mean over some tests, in percent."""
    return mean(row["tests"][name] for name in sets)


def forgetting(row: dict) -> float:
    """Log perplexity, which differences are taken of; a model that has come apart counts as 100."""
    return 100.0 if row["perplexity"] is None else math.log(row["perplexity"])


def search_table(found: Results) -> Table:
    """Validation by learning rate. The chosen one is bold; an end of the range is marked, for the best may lie
    beyond. Methods with a single rate are left out."""
    lines = []
    for variant in found.study.methods:
        if len(variant.rates) == 1:
            continue
        by_rate: dict[float, list[float]] = {}
        for row in found.search[variant.name]:
            by_rate.setdefault(row["rate"], []).append(validation(row))
        chosen, cells = found.rates[variant.name], []
        for rate in variant.rates:
            said = "not run" if rate not in by_rate else f"{mean(by_rate[rate]):.1f}"
            said = "diverged" if said == "-inf" else said
            cells.append(f"**{rate:g}: {said}**" if rate == chosen else f"{rate:g}: {said}")
        end = chosen in (variant.rates[0], variant.rates[-1])
        lines.append([variant.name, " / ".join(cells), "at the end of the range" if end else ""])
    return Table(["method", "learning rate: mean over the validation parts, %", ""], lines, left=3)


def result_table(found: Results) -> Table:
    """Each method at its rate, over seeds."""
    study = found.study
    lines = []
    if found.base:
        cells = [f"{reached(found.base, sets):.1f}" for sets in study.groups.values()]
        lines.append([BASE, "", "", "", *cells, _perplexity([found.base]), "",
                      f"{validation(found.base):.1f}"])  # fmt: skip
    for variant in study.methods:
        rows = list(found.best[variant.name].values())
        if rows:
            lines.append([
                variant.name, f"{rows[0]['trained'] / 1e6:.1f} M", f"{rows[0]['rate']:g}", str(len(rows)),
                *(str(Estimate.of([reached(row, sets) for row in rows])) for sets in study.groups.values()),
                _perplexity(rows), _change(rows), str(Estimate.of([validation(row) for row in rows])),
            ])  # fmt: skip
    return Table(["method", "trained", "rate", "seeds", *study.groups, "perplexity", "change, %", "validation"], lines)


def _perplexity(rows: list[dict]) -> str:
    """The geometric mean with its interval."""
    logs = Estimate.of([forgetting(row) for row in rows])
    if logs.half is None:
        return f"{math.exp(logs.mean):.1f}"
    return f"{math.exp(logs.mean):.1f} ({math.exp(logs.mean - logs.half):.1f} to {math.exp(logs.mean + logs.half):.1f})"


def _change(rows: list[dict]) -> str:
    found = [100 * row["change"]["frobenius"] for row in rows if "change" in row]
    return f"{mean(found):.1f}" if found else ""


def difference_table(found: Results) -> Table:
    """Paired differences of the study's ``compare``: points of accuracy, and percent of perplexity."""
    lines = []
    for name, others in found.study.compare.items():
        for other in others:
            one, two = found.best[name], found.best[other]
            seeds = sorted(set(one) & set(two))
            if not seeds:
                continue
            cells = [
                Estimate.of([reached(one[seed], sets) - reached(two[seed], sets) for seed in seeds]).signed()
                for sets in found.study.groups.values()
            ]
            percent = [100 * (forgetting(one[seed]) - forgetting(two[seed])) for seed in seeds]
            lines.append([f"{name} - {other}", str(len(seeds)), *cells, Estimate.of(percent).signed()])
    return Table(["difference", "seeds", *found.study.groups, "log perplexity, x 100"], lines)


def set_table(found: Results) -> Table:
    """Each test by itself."""
    names = list(dict.fromkeys(name for row in found.rows for name in row["tests"]))
    lines = [[BASE, *(f"{found.base['tests'][name]:.1f}" for name in names)]] if found.base else []
    for variant in found.study.methods:
        rows = list(found.best[variant.name].values())
        if rows:
            lines.append([variant.name, *(str(Estimate.of([row["tests"][name] for row in rows])) for name in names)])
    return Table(["method", *names], lines)


def spectrum_table(found: Results) -> Table:
    """Means over the layers that a study's ``spectrum`` names."""
    lines = []
    for variant in found.study.methods:
        spectra = _spectra(found, variant)
        if spectra:
            values = [mean(each[key] for each in spectra) for key in ("top", "outside", "rank", "stable")]
            lines.append([variant.name, f"{100 * values[0]:.1f}", f"{100 * values[1]:.1f}", f"{values[2]:.0f}",
                          f"{values[3]:.1f}"])  # fmt: skip
    heads = ["within the first tenth of both sides, %", "outside the columns, %", "effective rank", "stable rank"]
    return Table(["method", *heads], lines)


def _spectra(found: Results, variant: Variant) -> list[dict]:
    row = found.best[variant.name].get(found.study.seeds[0], {})
    return list(row.get("spectra", {}).values())


def write(study: Study) -> str:
    """Writes the tables and pictures of a study; returns the tables.

    Raises:
        EvidenceError: there are no rows.
    """
    file = study.folder / "rows.jsonl"
    found = results(study, read_rows(file), fingerprint(study))
    if not found.rows:
        raise EvidenceError(f"There are no rows of {study.name} in {file}: run it first, with --minutes and --jobs")
    text = markdown(found)
    (study.folder / f"{study.name}.md").write_text(text, "utf-8")
    draw_accuracy(found, study.folder / f"{study.name}-accuracy.png")
    if any(_spectra(found, variant) for variant in study.methods):
        draw_spectra(found, study.folder / f"{study.name}-spectrum.png")
    return text


def markdown(found: Results) -> str:
    """All tables of a study."""
    rows, study = found.rows, found.study
    machines = sorted({f"{row['machine']}, torch {row['torch']}" for row in rows})
    dates = sorted({row["date"] for row in rows})
    steps = sorted({row["steps"] for row in rows if row["variant"] != BASE})
    facts = [
        f"{study.model}; {'; '.join(machines)}; {' to '.join(dict.fromkeys((dates[0], dates[-1])))}.",
        f"{len(rows)} runs, of {' or '.join(map(str, steps)) or 'no'} steps with {study.training.batch} records each.",
        f"Learning rates, where there are several, were chosen on the validation parts, with seed "
        f"{', '.join(map(str, study.search_seeds))}; the results are those of seeds "
        f"{', '.join(map(str, study.seeds))}.",
        "Intervals are of 95 % over seeds: they say nothing of other questions. A bold difference is one whose "
        "interval does not contain 0; of 20 that are nothing, one is bold.",
    ]  # fmt: skip
    parts = [f"# {study.name}", "\n".join(f"- {fact}" for fact in facts)]
    tables = {
        "Learning rates": search_table(found),
        "Results": result_table(found),
        "Paired differences": difference_table(found),
        "Each test": set_table(found),
        "The change of the weights, along the singular directions of the base": spectrum_table(found),
    }
    parts += [f"## {title}\n\n{table.markdown()}" for title, table in tables.items() if table.rows]
    return "\n\n".join(parts) + "\n"


def draw_accuracy(found: Results, file) -> None:
    """Accuracy over forgetting, and forgetting over the size of the change; every run is a point."""
    from matplotlib.figure import Figure

    study = found.study
    figure = Figure(figsize=(13, 5), layout="constrained")
    by_forgetting, by_change = figure.subplots(1, 2)
    for number, variant in enumerate(study.methods):
        color, marker = f"C{number % 10}", "osD^vP*X"[number // 10 % 8]
        for rows, filled in ((found.search[variant.name], False), (list(found.best[variant.name].values()), True)):
            rows = [row for row in rows if row["perplexity"] is not None and row["loss"] is not None]
            look = {"color": color, "marker": marker, "facecolors": color if filled else "none", "s": 28}
            label = variant.name if filled or not found.best[variant.name] else None
            x, y = [row["perplexity"] for row in rows], [reached(row, study.groups[study.headline]) for row in rows]
            by_forgetting.scatter(x, y, label=label, **look)
            changed = [row for row in rows if "change" in row]
            sizes = [100 * row["change"]["frobenius"] for row in changed]
            by_change.scatter(sizes, [row["perplexity"] for row in changed], **look)
    if found.base:
        place = found.base["perplexity"], reached(found.base, study.groups[study.headline])
        by_forgetting.scatter(*place, color="black", marker="*", s=120, label="base")
        by_change.axhline(found.base["perplexity"], color="black", linewidth=1, linestyle="--")
    by_forgetting.set(
        xscale="log", xlabel="perplexity of plain English (less is better)", ylabel=f"{study.headline}, %",
        title="accuracy over forgetting: each method's best rate filled, the search hollow",
    )  # fmt: skip
    by_change.set(
        xscale="log", yscale="log", xlabel="size of the change of the weights, % (Frobenius norm)",
        ylabel="perplexity of plain English", title="forgetting over the size of the change",
    )  # fmt: skip
    _plain_numbers(figure)
    figure.legend(loc="outside right center", fontsize="small")
    figure.savefig(file, dpi=120)


def draw_spectra(found: Results, file) -> None:
    """Where in the base's spectrum the change of each method is: a curve a method, mean over layers. Dotted are the
    squares of the base's singular values, and a change that is the same along all directions."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5), layout="constrained")
    sides = dict(zip(("left", "right"), figure.subplots(1, 2), strict=True))
    where: list[float] = []
    for number, variant in enumerate(found.study.methods):
        spectra = _spectra(found, variant)
        if not spectra:
            continue
        if not where:
            bins = len(spectra[0]["squares"])
            where = [(place + 0.5) / bins for place in range(bins)]
            squares = [100 * mean(each["squares"][place] for each in spectra) for place in range(bins)]
            for axes in sides.values():
                axes.plot(where, squares, ":", color="black", label="squares of the values" * (axes is sides["left"]))
                axes.axhline(100 / bins, color="gray", linewidth=1, linestyle=":")
        style = ["-", "--", ":"][number // 10 % 3]
        for side, axes in sides.items():
            shares = [mean(each[side][place] for each in spectra) for place in range(len(where))]
            label = variant.name if side == "left" else None
            axes.plot(where, [100 * share for share in shares], style, color=f"C{number % 10}", label=label)
    for side, axes in sides.items():
        axes.set(
            yscale="log", xlabel="place in the base's spectrum, from its largest singular value to its smallest",
            ylabel="share of the change's energy, %",
            title=f"along the {side} singular vectors ({'what a layer writes' if side == 'left' else 'what it reads'})",
        )  # fmt: skip
    _plain_numbers(figure)
    figure.legend(loc="outside right center", fontsize="small")
    figure.savefig(file, dpi=120)


def _plain_numbers(figure) -> None:
    """Has logarithmic axes show 20 and not 2 x 10^1."""
    from matplotlib.ticker import LogFormatter

    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        if axis.get_scale() == "log":
            axis.set_major_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
            axis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
