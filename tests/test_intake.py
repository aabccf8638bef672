"""Strict JSON: JSONTestSuite's well-known cases, what JSON allows and the gateway does not, and the round trip."""

from __future__ import annotations

import json
import math
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc import limits
from extproc.errors import BadRequest
from extproc.intake import parse_json

# Cases of JSONTestSuite (github.com/nst/JSONTestSuite), by their names there. The suite's documents are values of any
# kind; here each stands in an object's field, since a request's body is an object.
ACCEPTED = {
    "y_array_arraysWithSpaces": b"[[]   ]",
    "y_array_empty-string": b'[""]',
    "y_array_empty": b"[]",
    "y_array_false": b"[false]",
    "y_array_heterogeneous": b'[null, 1, "1", {}]',
    "y_array_with_1_and_newline": b"[1\n]",
    "y_array_with_leading_space": b" [1]",
    "y_array_with_several_null": b"[1,null,null,null,2]",
    "y_array_with_trailing_space": b"[2] ",
    "y_number_0e+1": b"[0e+1]",
    "y_number_0e1": b"[0e1]",
    "y_number_after_space": b"[ 4]",
    "y_number_double_close_to_zero": b"[-0.000000000000000000000000000000000000000000000000000000000000000001]",
    "y_number_int_with_exp": b"[20e1]",
    "y_number_minus_zero": b"[-0]",
    "y_number_negative_int": b"[-123]",
    "y_number_real_capital_e_neg_exp": b"[1E-2]",
    "y_number_real_capital_e_pos_exp": b"[1E+2]",
    "y_number_real_exponent": b"[123e45]",
    "y_number_real_fraction_exponent": b"[123.456e78]",
    "y_number_simple_real": b"[123.456789]",
    "i_number_real_underflow": b"[123e-10000000]",
    "y_object_basic": b'{"asd":"sdf"}',
    "y_object_empty_key": b'{"":0}',
    "y_object_escaped_null_in_key": b'{"foo\\u0000bar": 42}',
    "y_object_extreme_numbers": b'{ "min": -1.0e+28, "max": 1.0e+28 }',
    "y_object_string_unicode": b'{"title":"\\u041f\\u043e\\u043b\\u0442\\u043e\\u0440\\u0430" }',
    "y_object_with_newlines": b'{\n"a": "b"\n}',
    "y_string_1_2_3_bytes_UTF-8_sequences": b'["\\u0060\\u012a\\u12AB"]',
    "y_string_accepted_surrogate_pair": b'["\\uD801\\udc37"]',
    "y_string_accepted_surrogate_pairs": b'["\\ud83d\\ude39\\ud83d\\udc8d"]',
    "y_string_allowed_escapes": b'["\\"\\\\\\/\\b\\f\\n\\r\\t"]',
    "y_string_backslash_and_u_escaped_zero": b'["\\\\u0000"]',
    "y_string_backslash_doublequotes": b'["\\""]',
    "y_string_comments": b'["a/*b*/c/*d//e"]',
    "y_string_double_escape_n": b'["\\\\n"]',
    "y_string_escaped_noncharacter": b'["\\uFFFF"]',
    "y_string_last_surrogates_1_and_2": b'["\\uDBFF\\uDFFF"]',
    "y_string_nonCharacterInUTF-8_U+FFFF": b'["\xef\xbf\xbf"]',
    "y_string_null_escape": b'["\\u0000"]',
    "y_string_one-byte-utf-8": b'["\\u002c"]',
    "y_string_pi": b'["\xcf\x80"]',
    "y_string_reservedCharacterInUTF-8_U+1BFFF": b'["\xf0\x9b\xbf\xbf"]',
    "y_string_u+2028_line_sep": b'["\xe2\x80\xa8"]',
    "y_string_unescaped_char_delete": b'["\x7f"]',
    "y_string_unicodeEscapedBackslash": b'["\\u005C"]',
    "y_string_unicode_U+1FFFE_nonchar": b'["\\uD83F\\uDFFE"]',
    "y_string_with_del_character": b'["a\x7fa"]',
    "y_structure_lonely_false": b"false",
    "y_structure_lonely_null": b"null",
    "y_structure_lonely_negative_real": b"-0.1",
    "y_structure_string_empty": b'""',
    "y_structure_whitespace_array": b" [] ",
}

REFUSED = {
    "n_array_1_true_without_comma": b"[1 true]",
    "n_array_a_invalid_utf8": b"[a\xe5]",
    "n_array_colon_instead_of_comma": b'["": 1]',
    "n_array_comma_after_close": b'[""],',
    "n_array_double_comma": b"[1,,2]",
    "n_array_extra_comma": b'["",]',
    "n_array_incomplete": b'["x"',
    "n_array_inner_array_no_comma": b"[3[4]]",
    "n_array_just_comma": b"[,]",
    "n_array_just_minus": b"[-]",
    "n_array_star_inside": b"[*]",
    "n_array_unclosed_with_new_lines": b"[1,\n1\n,1",
    "n_incomplete_false": b"[fals]",
    "n_multidigit_number_then_00": b"123\x00",
    "n_number_++": b"[++1234]",
    "n_number_+1": b"[+1]",
    "n_number_+Inf": b"[+Inf]",
    "n_number_-01": b"[-01]",
    "n_number_-1.0.": b"[-1.0.]",
    "n_number_-NaN": b"[-NaN]",
    "n_number_.-1": b"[.-1]",
    "n_number_.2e-3": b"[.2e-3]",
    "n_number_0.3e+": b"[0.3e+]",
    "n_number_0_capital_E": b"[0E]",
    "n_number_1.0e": b"[1.0e]",
    "n_number_1_000": b"[1 000.0]",
    "n_number_1eE2": b"[1eE2]",
    "n_number_2.e3": b"[2.e3]",
    "n_number_9.e+": b"[9.e+]",
    "n_number_Inf": b"[Inf]",
    "n_number_NaN": b"[NaN]",
    "n_number_U+FF11_fullwidth_digit_one": b"[\xef\xbc\x91]",
    "n_number_expression": b"[1+2]",
    "n_number_hex_1_digit": b"[0x1]",
    "n_number_infinity": b"[Infinity]",
    "n_number_minus_infinity": b"[-Infinity]",
    "n_number_neg_int_starting_with_zero": b"[-012]",
    "n_number_neg_real_without_int_part": b"[-.123]",
    "n_number_real_without_fractional_part": b"[1.]",
    "n_number_with_leading_zero": b"[012]",
    "i_number_huge_exp": b"[0.4e00669999999999999999999999999999999999999999999999999]",
    "i_number_neg_int_huge_exp": b"[-1e+9999]",
    "i_number_real_pos_overflow": b"[123123e100000]",
    "i_number_too_big_neg_int": b"[-123123123123123123123123123123]",
    "i_number_too_big_pos_int": b"[100000000000000000000]",
    "i_number_very_big_negative_int": b"[-237462374673276894279832749832423479823246327846]",
    "n_object_bad_value": b'["x", truth]',
    "n_object_comma_instead_of_colon": b'{"x", null}',
    "n_object_double_colon": b'{"x"::"b"}',
    "n_object_missing_colon": b'{"a" b}',
    "n_object_missing_key": b'{:"b"}',
    "n_object_no-colon": b'{"a"',
    "n_object_non_string_key": b"{1:1}",
    "n_object_single_quote": b"{'a':0}",
    "n_object_trailing_comma": b'{"id":0,}',
    "n_object_trailing_comment": b'{"a":"b"}/**/',
    "n_object_unquoted_key": b'{a: "b"}',
    "n_object_with_trailing_garbage": b'{"a":"b"}#',
    "y_object_duplicated_key": b'{"a":"b","a":"c"}',
    "y_object_duplicated_key_and_value": b'{"a":"b","a":"b"}',
    "n_string_1_surrogate_then_escape_u": b'["\\uD800\\u"]',
    "i_string_1st_surrogate_but_2nd_missing": b'["\\uDADA"]',
    "i_string_1st_valid_surrogate_2nd_invalid": b'["\\uD888\\u1234"]',
    "i_string_inverted_surrogates_U+1D11E": b'["\\uDd1e\\uD834"]',
    "i_string_lone_second_surrogate": b'["\\uDFAA"]',
    "i_string_UTF-8_invalid_sequence": b'["\xe6\x97\xa5\xd1\x88\xfa"]',
    "i_string_UTF8_surrogate_U+D800": b'["\xed\xa0\x80"]',
    "i_string_overlong_sequence_2_bytes": b'["\xc0\xaf"]',
    "i_string_truncated-utf-8": b'["\xe0\xff"]',
    "n_string_backslash_00": b'["\\\x00"]',
    "n_string_escape_x": b'["\\x00"]',
    "n_string_incomplete_escape": b'["\\"]',
    "n_string_incomplete_escaped_character": b'["\\u00A"]',
    "n_string_invalid_unicode_escape": b'["\\uqqqq"]',
    "n_string_no_quotes_with_bad_escape": b"[\\n]",
    "n_string_single_quote": b"['single quote']",
    "n_string_start_escape_unclosed": b'["\\',
    "n_string_unescaped_ctrl_char": b'["a\x00a"]',
    "n_string_unescaped_newline": b'["new\nline"]',
    "n_string_unescaped_tab": b'["\t"]',
    "n_structure_angle_bracket_null": b"[<null>]",
    "n_structure_array_trailing_garbage": b"[1]x",
    "n_structure_array_with_extra_array_close": b"[1]]",
    "n_structure_capitalized_True": b"[True]",
    "n_structure_close_unopened_array": b"1]",
    "n_structure_double_array": b"[][]",
    "n_structure_no_data": b"",
    "n_structure_object_with_comment": b'{"a":/*comment*/"b"}',
    "n_structure_open_array_apostrophe": b"['",
    "n_structure_U+2060_word_joined": b"[\xe2\x81\xa0]",
    "n_structure_unicode-identifier": b"\xc3\xa5",
    "n_structure_whitespace_formfeed": b"[\x0c]",
}


@pytest.mark.parametrize("document", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_accepts(document: bytes) -> None:
    value = parse_json(b'{"x":' + document + b"}")
    assert value == json.loads(b'{"x":' + document + b"}")
    assert orjson.loads(orjson.dumps(value)) == value


@pytest.mark.parametrize("document", REFUSED.values(), ids=REFUSED.keys())
def test_refuses(document: bytes) -> None:
    with pytest.raises(BadRequest):
        parse_json(b'{"x":' + document + b"}")


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        pytest.param(b"", "empty_body", None, id="empty"),
        pytest.param(b" ", "invalid_json", None, id="white space"),
        pytest.param(b"[]", "not_an_object", None, id="array"),
        pytest.param(b'"x"', "not_an_object", None, id="string"),
        pytest.param(b"\xef\xbb\xbf{}", "invalid_encoding", None, id="byte order mark"),
        pytest.param('{"a":1}'.encode("utf-16"), "invalid_encoding", None, id="UTF-16"),
        pytest.param(b'{"a":"\xff"}', "invalid_encoding", None, id="not UTF-8"),
        pytest.param(b'{"a":1,"a":1}', "duplicate_key", "a", id="duplicate"),
        pytest.param(b'{"a":1,"\\u0061":1}', "duplicate_key", "a", id="duplicate by escape"),
        pytest.param(b'{"m":[{},{"c":{"x":1,"x":2}}]}', "duplicate_key", "m[1].c.x", id="duplicate deep inside"),
        pytest.param(b'{"a":{"b":1,"b":2},"a":3}', "duplicate_key", "a.b", id="first of two duplicates"),
        pytest.param(b'{"a b":{"":1,"":2}}', "duplicate_key", '["a b"][""]', id="names that are not plain"),
        pytest.param(b'{"m":[1,NaN]}', "invalid_json", "m[1]", id="NaN"),
        pytest.param(b'{"t":-Infinity}', "invalid_json", "t", id="infinity"),
        pytest.param(b'{"t":1e999}', "invalid_number", "t", id="overflow"),
        pytest.param(b'{"n":18446744073709551616}', "invalid_number", "n", id="above 64 bits"),
        pytest.param(b'{"n":-9223372036854775809}', "invalid_number", "n", id="below 64 bits"),
        pytest.param(b'{"n":' + b"1" * 5000 + b"}", "invalid_number", "n", id="more digits than Python reads"),
        pytest.param(b'{"a":["\\ud800"]}', "invalid_string", "a[0]", id="half a pair"),
        pytest.param(b'{"\\udc00":1}', "invalid_string", '["\\udc00"]', id="half a pair in a name"),
        pytest.param(b'{"a":1,"a":2,}', "invalid_json", None, id="a syntax error beside a duplicate"),
    ],
)
def test_names_what_is_wrong_and_where(body: bytes, code: str, param: str | None) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_json(body)
    assert (caught.value.code, caught.value.param) == (code, param)
    assert orjson.dumps([caught.value.message, caught.value.param])  # the answer can carry it


def test_a_syntax_error_says_where() -> None:
    with pytest.raises(BadRequest, match=r"line 2, column 5"):
        parse_json(b'{"a":1,\n"b" 2}')


def test_an_error_repeats_only_a_bounded_part_of_a_name() -> None:
    name = b'"' + b"x" * 10_000 + b'"'
    with pytest.raises(BadRequest) as caught:
        parse_json(b"{" + name + b":1," + name + b":2}")
    assert caught.value.param is not None
    assert len(caught.value.param) <= limits.MAX_ERROR_FIELD_CHARS


@pytest.mark.parametrize(("opening", "closing"), [(b"[", b"]"), (b'{"a":', b"}")], ids=["arrays", "objects"])
def test_depth_is_bounded(opening: bytes, closing: bytes) -> None:
    def nested(depth: int) -> bytes:  # the outermost object counts as a level
        return b'{"x":' + opening * (depth - 1) + (b"1" if opening != b"[" else b"") + closing * (depth - 1) + b"}"

    assert parse_json(nested(limits.MAX_JSON_DEPTH))
    for depth in (limits.MAX_JSON_DEPTH + 1, 10_000):
        with pytest.raises(BadRequest) as caught:
            parse_json(nested(depth))
        assert caught.value.code == "too_deep"


@pytest.mark.parametrize(
    "text", ["[" * 1000, '\\"[' * 1000, "\\\\[" * 1000, '{"a":' * 1000, "]" * 1000], ids=lambda text: text[:6]
)
def test_brackets_in_text_are_not_depth(text: str) -> None:
    body = json.dumps({"messages": [{"content": text}, {"content": text + "\\"}, {"content": text}]}).encode()
    assert parse_json(body) == json.loads(body)


@pytest.mark.parametrize("text", [b'"\\\\"', b'"\\""', b'"\\\\\\""'], ids=["backslash", "quote", "backslash and quote"])
def test_depth_does_not_hide_behind_escapes(text: bytes) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_json(b'{"a":' + text + b',"b":' + b"[" * 100 + b"]" * 100 + b"}")
    assert caught.value.code == "too_deep"


@pytest.mark.parametrize("value", [b"{}", b"0", b'""', b"[]"], ids=["objects", "numbers", "texts", "arrays"])
def test_the_number_of_values_is_bounded(value: bytes) -> None:
    count = limits.MAX_JSON_STRUCTURE_BYTES + 1
    with pytest.raises(BadRequest) as caught:
        parse_json(b'{"x":[' + b",".join([value] * count) + b"]}")
    assert caught.value.code == "too_complex"


def test_a_body_of_quotes_is_refused_before_it_is_split() -> None:
    with pytest.raises(BadRequest) as caught:
        parse_json(b'"' * limits.MAX_REQUEST_BYTES)
    assert caught.value.code == "too_complex"


def test_as_many_messages_as_are_allowed_are_accepted() -> None:
    message = {"role": "user", "content": [{"type": "text", "text": "hi"}]}
    body = {"model": "m", "messages": [message] * limits.MAX_MESSAGES}
    assert parse_json(json.dumps(body, indent=2).encode()) == body


@pytest.mark.parametrize(
    ("written", "sent_on"),
    [
        (b"1", b"1"),
        (b"1.0", b"1.0"),
        (b"-0", b"0"),
        (b"-0.0", b"-0.0"),
        (b"1e2", b"100.0"),
        (b"9007199254740993", b"9007199254740993"),
        (b"18446744073709551615", b"18446744073709551615"),
        (b"-9223372036854775808", b"-9223372036854775808"),
        (b"0.1234567890123456789", b"0.12345678901234568"),
        (b"1e-999", b"0.0"),
    ],
    ids=str,
)
def test_numbers_mean_the_same_when_sent_on(written: bytes, sent_on: bytes) -> None:
    value = parse_json(b'{"x":' + written + b"}")
    assert orjson.dumps(value) == b'{"x":' + sent_on + b"}"
    assert isinstance(value["x"], float) == (b"." in sent_on)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text(), _JSON), st.booleans())
def test_whatever_is_accepted_survives_being_sent_on(value: dict[str, Any], ascii_only: bool) -> None:
    body = json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    try:
        parsed = parse_json(body)
    except BadRequest:
        assert _unfit(value)
        return
    assert parsed == json.loads(body)
    assert orjson.loads(orjson.dumps(parsed)) == parsed


def _unfit(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_unfit(part) for item in value.items() for part in item)
    if isinstance(value, list):
        return any(map(_unfit, value))
    if isinstance(value, str):
        return any("\ud800" <= char <= "\udfff" for char in value)
    if isinstance(value, float):
        return not math.isfinite(value)
    return isinstance(value, int) and not -(2**63) <= value < 2**64


@given(st.text(alphabet='{}[]:,"\\a1 \n', max_size=40))
def test_agrees_with_a_plain_reader_on_any_text(text: str) -> None:
    body = text.encode()
    try:
        parsed: Any = parse_json(body)
    except BadRequest as error:
        if error.code != "duplicate_key":
            assert not _is_object(body)
        return
    assert parsed == json.loads(body)


def _is_object(body: bytes) -> bool:
    try:
        return isinstance(json.loads(body), dict)
    except ValueError:
        return False
