# SPDX-License-Identifier: Apache-2.0
"""A table of images: each row says a label, a domain, a split, and by a template where its image lies.

One reader for the five sets of WILDS (configs/data/wilds_*.yaml) and for whatever else comes as CSV beside images.
"""

from __future__ import annotations

import csv
import logging
import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from typing_extensions import override

from moeapps.bounds import BoundError, check_rows
from moeapps.data.domain import ROLES, SPLITS_OF, Role, Split
from moeapps.data.images.arrays import ImageFileError
from moeapps.files import absent
from tasks.adaptation.data.readers.files import DomainFiles, FileDomains, ImageForm, dealt, domain_name, filled
from tasks.adaptation.data.source import Target

log = logging.getLogger("moeapps")

Row = dict[str, str]


@dataclass(frozen=True)
class Derived:
    """A column made of another one.

    Args:
        column: the column it is made of.
        first: keep so many characters of it: 4 make a year of a date.
        table: look the value up in another CSV file below the root.
        key: column of that file that holds the value.
        value: column of it that is taken.
        other: what is taken where the value is not found.

    Raises:
        ValueError: a table without its columns, or neither way chosen.
    """

    column: str
    first: int | None = None
    table: str | None = None
    key: str | None = None
    value: str | None = None
    other: str = "other"

    def __post_init__(self) -> None:
        looks_up = self.table is not None and self.key is not None and self.value is not None
        if looks_up == (self.first is not None):
            raise ValueError(f"derived from {self.column!r}: give either first, or all of table, key and value")


@dataclass(frozen=True)
class Rule:
    """Which rows have a role, and a split; the first rule that fits a row decides.

    Args:
        role: seen, validation or unseen.
        where: column -> what it must hold: a value, one of a list of values, or ``{from: a, below: b}`` for text from a
            on (dates), less than b.
        split: train, val or test; a list shares the rows out equally; None leaves it to the shares of `FileDomains`.

    Raises:
        ValueError: another role, or a split that the role does not have.
    """

    role: Role
    where: dict[str, Any] = field(default_factory=dict)
    split: Split | list[Split] | None = None

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"role={self.role!r} is not allowed; use one of {', '.join(ROLES)}")
        wrong = [split for split in self.splits if split not in SPLITS_OF[self.role]]
        if wrong:
            raise ValueError(f"split={wrong[0]!r} is not allowed for {self.role} rows; use {SPLITS_OF[self.role]}")
        for column, wanted in self.where.items():
            if isinstance(wanted, dict) and not (wanted and set(wanted) <= {"from", "below"}):
                raise ValueError(f"where {column}: {wanted}; give a value, a list, or from and below")

    @property
    def splits(self) -> list[Split]:
        """The splits named, as a list."""
        return [] if self.split is None else [self.split] if isinstance(self.split, str) else list(self.split)

    def fits(self, row: Row) -> bool:
        """Return whether a row is meant."""
        return all(_holds(row[column], wanted) for column, wanted in self.where.items())


def _holds(text: str, wanted: Any) -> bool:
    if isinstance(wanted, dict):
        return str(wanted.get("from", "")) <= text and ("below" not in wanted or text < str(wanted["below"]))
    return any(_same(text, str(value)) for value in (wanted if isinstance(wanted, list) else [wanted]))


@lru_cache(maxsize=4096)
def _same(text: str, value: str) -> bool:
    """Whether two cells are alike as text, or as numbers (1 and 1.0)."""
    if text == value:
        return True
    try:
        return float(text) == float(value)
    except ValueError:
        return False


class TableDomains(FileDomains):
    """Images that a CSV file lists; domains, roles and splits are read off its columns.

    Templates are texts with columns in braces, and ``{row}`` for the number of the row in the file, counted from 0. A
    domain has the role of its rows' rule; a run that gives it another role draws its splits anew. Rows that no rule
    fits are left out.

    Args:
        root: folder of the data.
        image: template of the path of an image below the root.
        label: column of the label.
        domain: template of the name of a domain; what a name may not hold becomes an underscore.
        rules: which rows have which role and split; None lets the run name the roles and draws the splits.
        table: the CSV file below the root; its first line names the columns.
        derived: further columns.
        target: classification, or regression on a label that is a number.
        least: domains with fewer images are left out, with a line that says how many.
        form: how a file becomes an image.
        options: see `FileDomains`.

    Raises:
        ImageFileError: no such folder or file, an unknown column, a table without rows, a domain whose rows have
            different roles, a label that is no number in regression.
    """

    def __init__(
        self,
        *,
        root: Path,
        image: str,
        label: str,
        domain: str,
        rules: list[Rule] | None = None,
        table: str = "metadata.csv",
        derived: dict[str, Derived] | None = None,
        target: Target = "classification",
        least: int = 2,
        form: ImageForm | None = None,
        **options: Any,
    ) -> None:
        super().__init__(root=root, form=form, **options)
        if target not in get_args(Target):
            raise ValueError(f"target={target!r} is not allowed; use one of {', '.join(get_args(Target))}")
        self.target, self.path = target, self.root / table
        self.rules = rules or []
        wanted = {label, *_columns(image), *_columns(domain)}
        wanted |= {column for rule in self.rules for column in rule.where}
        rows = self._read(wanted - {"row"}, derived or {})
        self.class_names = [] if target == "regression" else _in_order({row[label] for row in rows})
        self._domains = self._grouped(rows, image, label, domain)
        few = {name: len(own.files) for name, (_, own) in self._domains.items() if len(own.files) < least}
        if few:
            log.info("%s: %d domains of fewer than %d images are left out", self.path.name, len(few), least)
            self._domains = {name: found for name, found in self._domains.items() if name not in few}
        self.domains = _in_order(set(self._domains))
        self.default_roles = {  # type: ignore[misc]  # the base class' are of the class
            role: [name for name in self.domains if self._domains[name][0] == role] for role in ROLES
        }

    @override
    def of(self, domain: str) -> DomainFiles:
        role, own = self._domains[domain]
        return own if role == self.role_of[domain] else DomainFiles(own.files, own.label)

    @override
    def describe(self, domain: str) -> str:
        return f"rows {domain} of {self.root.name}/{self.path.name}, {self.image_size} x {self.image_size}"

    # Reading --------------------------------------------------------------------------------------------------------

    def _read(self, wanted: set[str], derived: dict[str, Derived]) -> list[Row]:
        """Read the columns that are needed, and those derived from others, of every row."""
        sources = {made.column for made in derived.values()}
        rows = read_csv(self.path, (wanted - set(derived)) | sources)
        for number, row in enumerate(rows):
            row["row"] = str(number)
        for name, made in derived.items():
            if made.first is not None:
                for row in rows:
                    row[name] = row[made.column][: made.first]
                continue
            key, value = str(made.key), str(made.value)
            found = {line[key]: line[value] for line in read_csv(self.root / str(made.table), {key, value})}
            for row in rows:
                row[name] = found.get(row[made.column], made.other)
        return rows

    def _grouped(
        self, rows: list[Row], image: str, label: str, domain: str
    ) -> dict[str, tuple[Role | None, DomainFiles]]:
        """Return domain -> its role (None without rules) and its files."""
        number = {name: place for place, name in enumerate(self.class_names)}
        groups: dict[str, list[tuple[Row, Rule | None]]] = {}
        for row in rows:
            rule = next((rule for rule in self.rules if rule.fits(row)), None)
            if rule is not None or not self.rules:
                groups.setdefault(domain_name(domain.format(**row)), []).append((row, rule))
        if not groups:
            raise ImageFileError(f"no row of {self.path} fits a rule; check the rules against its columns")
        found: dict[str, tuple[Role | None, DomainFiles]] = {}
        for name, members in groups.items():
            roles = {rule.role for _, rule in members if rule is not None}
            if len(roles) > 1:
                raise ImageFileError(
                    f"{self.path}: rows of the domain {name!r} are {' and '.join(sorted(roles))}; a domain has one "
                    "role: change the rules, or name domains by more columns"
                )
            files = [self.root / image.format(**row) for row, _ in members]
            values = torch.tensor([self._value(row[label], label, number) for row, _ in members])
            role = next(iter(roles), None)
            splits = None if role is None else self._splits(values, [rule for _, rule in members], role)
            found[name] = (role, DomainFiles(files, values, splits))
        return found

    def _value(self, text: str, label: str, number: dict[str, int]) -> int | float:
        if self.target == "classification":
            return number[text]
        try:
            return float(text)
        except ValueError as error:
            raise ImageFileError(
                f"{self.path}: {label} holds {text!r}; regression needs a number in every row"
            ) from error

    def _splits(self, label: Tensor, rules: list[Rule | None], role: Role) -> dict[Split, Tensor] | None:
        """Return the splits of one domain's rows, if its rules name any; where a rule names none, the role's first."""
        ways = [tuple(rule.splits) if rule is not None else () for rule in rules]
        if not any(ways):
            return None
        kind = label if self.target == "classification" else torch.zeros(len(label), dtype=torch.int64)
        parts: dict[Split, list[Tensor]] = {}
        for way in sorted(set(ways)):
            rows = torch.tensor([place for place, given in enumerate(ways) if given == way])
            for split, own in dealt(kind, rows, way or SPLITS_OF[role][:1], self.seed).items():
                parts.setdefault(split, []).append(own)
        return filled({split: torch.cat(rows).sort().values for split, rows in parts.items()}, SPLITS_OF[role])


def read_csv(path: Path, columns: set[str]) -> list[Row]:
    """Read some columns of a CSV file as text.

    Raises:
        ImageFileError: no such file, damaged, no rows, or no such column.
    """
    if not path.is_file():
        raise ImageFileError(f"{absent(path)}; set root to the folder that holds it")
    try:
        check_rows(path, line=120 + 73 * len(columns))  # a dict, and a text of each column in it
        with open(path, newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, strict=True)
            there = [name for name in reader.fieldnames or [] if name]
            missing = sorted(columns - set(there))
            if missing:
                raise ImageFileError(f"{path} has no column {missing[0]!r}; it has {', '.join(there) or 'none'}")
            rows = [{name: (line[name] or "") for name in columns} for line in reader]
    except BoundError as error:
        raise ImageFileError(str(error)) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ImageFileError(f"{path} is not a readable CSV file ({error}); write it again in UTF-8") from error
    if not rows:
        raise ImageFileError(f"{path} has no row below its header")
    return rows


def _columns(template: str) -> set[str]:
    """Return the columns that a template names."""
    return set(re.findall(r"{(\w+)[^}]*}", template))


def _in_order(names: set[str]) -> list[str]:
    """Sort as people count: numbers inside texts by their value."""

    def place(name: str) -> list[tuple[bool, int, str]]:
        parts = re.split(r"(\d+)", name)
        return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]

    return sorted(names, key=place)
