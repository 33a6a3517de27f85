# SPDX-License-Identifier: Apache-2.0
"""Columns of pyarrow as numbers and as hashes of ids; one value gives one result whatever type or spelling holds it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tasks.recommendation.data.readers.hashing import hash_bytes, hash_integers

TEXT = (pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary())
TRUTH = pa.array(["false", "False", "FALSE", "true", "True", "TRUE"])
_ZERO = np.uint8(ord("0"))


class TableError(ValueError):
    """A table that is missing, damaged, or does not hold what the configuration says."""


def plain_array(column: pa.Array | pa.ChunkedArray, *, dictionary: bool = False) -> pa.Array:
    """Return a column in one piece, without dictionaries unless they are wanted."""
    if isinstance(column, pa.ChunkedArray):
        column = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) and not dictionary else column


def to_numbers(column: pa.Array | pa.ChunkedArray, what: str, unit: float = 1.0) -> NDArray[np.float64]:
    """Return a column as float64 [n], NaN where there is no value.

    Args:
        column: numbers, truth values, dates and times (then seconds since 1970 / ``unit``), or text of these.
        what: file and column, for errors.
        unit: seconds per unit of times.

    Raises:
        TableError: something else; the message begins with ``what``.
    """
    array, scale = plain_array(column), 1.0
    if array.type in TEXT:
        array = _read_text(array.cast(pa.string()), what)
    if pa.types.is_timestamp(array.type) or pa.types.is_date(array.type):
        array, scale = array.cast(pa.timestamp("us"), safe=False).cast(pa.int64()), 1e-6 / unit
    try:
        array = array.cast(pa.uint8()) if pa.types.is_boolean(array.type) else array
        # A cast to the own type costs as much as the rest.
        array = array if array.type == pa.float64() else array.cast(pa.float64(), safe=False)
        numbers = array.to_numpy(zero_copy_only=False)
    except pa.ArrowException as error:
        raise TableError(f"{what}: values of type {array.type}; this column must hold numbers") from error
    return np.asarray(numbers if scale == 1 else numbers * scale)


def whole_numbers(column: pa.Array | pa.ChunkedArray) -> NDArray[np.integer[Any]] | None:
    """Return a column of integers or truth values in which none is missing as it is, without a cast; else None."""
    array = plain_array(column)
    if array.null_count or not (pa.types.is_integer(array.type) or pa.types.is_boolean(array.type)):
        return None
    array = array.cast(pa.uint8()) if pa.types.is_boolean(array.type) else array
    numbers: NDArray[np.integer[Any]] = array.to_numpy()
    return numbers


def _read_text(words: pa.Array, what: str) -> pa.Array:
    """Text as numbers, truth values or times: whatever all of it spells."""
    words = pc.utf8_trim_whitespace(words)
    truth = pc.if_else(pc.less(pc.index_in(words, TRUTH), 3), "0", "1")
    words = pc.coalesce(truth, pc.if_else(pc.equal(words, ""), None, words))
    reasons = []
    for kind in (pa.float64(), pa.timestamp("us"), pa.timestamp("us", "UTC")):
        try:
            return words.cast(kind)
        except pa.ArrowInvalid as error:
            reasons.append(error)
    raise TableError(f"{what}: {reasons[0]}; this column must hold numbers")


# Ids ------------------------------------------------------------------------------------------------------------------


def hash_values(
    column: pa.Array | pa.ChunkedArray, seed: int = 0, what: str = "ids", *, fractions: bool = False
) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
    """Hash the values of a column: 7, 7.0, "7" and "7.0" are one value, so are true, "True" and 1.

    Integers keep all their digits. Text that spells anything else ("007", "1e3") is hashed as text; dates and times as
    ISO text. Empty text is no value.

    Args:
        column: a column of any type but lists.
        seed: another seed gives other collisions.
        what: file and column, for errors.
        fractions: allow floats with fractions (hashed as text).

    Returns:
        Hashes uint64 [n], and bool [n]: True where there is no value.

    Raises:
        TableError: lists, fractions, or floats so large that their last digits are lost.
    """
    array = plain_array(column, dictionary=True)
    kind = array.type
    if pa.types.is_dictionary(kind):
        hashed, null = hash_values(array.dictionary, seed, what, fractions=fractions)
        place = array.indices.cast(pa.int64()).fill_null(len(hashed)).to_numpy()
        return np.append(hashed, np.uint64(0))[place], np.append(null, True)[place]
    if pa.types.is_nested(kind):
        raise TableError(f"{what}: values of type {kind} are no single ids; give lists under columns.bags")
    floats = pa.types.is_floating(kind)
    null = np.zeros(len(array), np.bool_)
    if array.null_count or floats:
        null = array.is_null(nan_is_null=floats).to_numpy(zero_copy_only=False)
    if floats:
        array = _whole(array, null, what, fractions)
    try:
        if pa.types.is_integer(array.type) or pa.types.is_boolean(kind):
            whole = array if array.type == pa.int64() else array.cast(pa.int64())
            return hash_integers((whole.fill_null(0) if whole.null_count else whole).to_numpy(), seed), null
    except pa.ArrowInvalid:
        pass  # uint64 above 2^63 - 1: text
    words = array.cast(pa.string()).fill_null("")
    if pa.types.is_timestamp(kind):
        words = pc.replace_substring_regex(words, r"\.0+(Z?)$", r"\1")
    hashed, length = _hash_text(words, seed)
    return hashed, null | (length == 0)


def _whole(array: pa.Array, null: NDArray[np.bool_], what: str, fractions: bool) -> pa.Array:
    """Floats as integers, or as text where there are fractions."""
    values = np.where(null, 0, array.cast(pa.float64()).to_numpy(zero_copy_only=False))
    if (values == np.rint(values)).all():
        if (np.abs(values) > 2.0**53).any():
            raise TableError(f"{what}: ids above 2^53 in a column of floats have lost digits; write integers or text")
        return pa.array(values.astype(np.int64))
    if not fractions:
        raise TableError(f"{what}: numbers with a fraction are no ids; make them integers or text")
    return pa.array(values).cast(pa.string())


def _hash_text(words: pa.Array, seed: int) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Return hashes [n] and lengths [n] of words without null."""
    offsets, data = text_buffers(words)
    length, hashed = np.diff(offsets), hash_bytes(offsets, data, seed)
    padded = np.append(data, np.uint8(0))
    first, last = padded[offsets[:-1]], padded[np.maximum(offsets[1:] - 1, 0)]
    # Few words that spell no number begin and end like one; only these are looked at more closely.
    maybe = np.flatnonzero((last - _ZERO <= 9) & ((first - _ZERO <= 9) | (first == ord("-"))) & (length > 0))
    if len(maybe):
        picked, size = words.take(pa.array(maybe)), length[maybe]
        usual = pc.ascii_is_decimal(picked).to_numpy(zero_copy_only=False)
        usual &= (size < 19) & ((first[maybe] != _ZERO) | (size == 1))
        numbers = picked.filter(pa.array(usual)).cast(pa.int64()).to_numpy()
        hashed[maybe[usual]] = hash_integers(numbers, seed)
        if not usual.all():
            at, numbers = _spelled(picked.filter(pa.array(~usual)))
            hashed[maybe[~usual][at]] = hash_integers(numbers, seed)
    maybe = np.flatnonzero(((length == 4) | (length == 5)) & np.isin(first, list(b"fFtT")))
    if len(maybe):
        place = pc.index_in(words.take(pa.array(maybe)), TRUTH).fill_null(-1).to_numpy()
        hashed[maybe[place >= 0]] = hash_integers(place[place >= 0] // 3, seed)
    return hashed, length


def _spelled(words: pa.Array) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which of these words spell an integer of 64 bits, perhaps with .0 behind it, and which integers these are."""
    words = pc.replace_substring_regex(words, r"^(?:-(0)|(-?[0-9]+))(?:\.0+)?$", r"\1\2")
    words = pc.extract_regex(words, r"^(?P<sign>-?)(?P<digits>0|[1-9][0-9]{0,18})$")
    sign, digits = words.field("sign"), words.field("digits")
    fits = pc.or_(pc.less(pc.binary_length(digits), 19), pc.less_equal(digits, str(2**63 - 1)))
    at = np.flatnonzero(pc.and_(words.is_valid(), fits).fill_null(False).to_numpy(zero_copy_only=False))
    return at, pc.binary_join_element_wise(sign, digits, "").take(pa.array(at)).cast(pa.int64()).to_numpy()


def text_buffers(words: pa.Array) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Return where each of n words begins in the bytes (int64 [n + 1]), and the bytes."""
    _, places, letters = words.buffers()
    if len(words) == 0 or letters is None:
        return np.zeros(len(words) + 1, np.int64), np.zeros(0, np.uint8)
    offsets = np.frombuffer(places, np.int32)[words.offset : words.offset + len(words) + 1].astype(np.int64)
    return offsets - offsets[0], np.frombuffer(letters, np.uint8)[offsets[0] : offsets[-1]]


def spelled_integers(words: pa.Array) -> pa.Array | None:
    """Return text as int64 if each of its values is an integer in its one usual spelling (not 007, +7 or 7.0)."""
    try:
        integers = words.cast(pa.int64())
    except pa.ArrowInvalid:
        return None
    padded = pc.and_(pc.starts_with(words, "0"), pc.greater(pc.binary_length(words), 1))
    return None if pc.any(pc.or_(padded, pc.starts_with(words, "-0"))).as_py() else integers
