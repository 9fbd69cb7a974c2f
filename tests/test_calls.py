"""The second domain's calls say what their requests say: read back by another route."""

import json
import re

from experiments import calls

ONES = dict(zip("one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
                "seventeen eighteen nineteen".split(), range(1, 20)))
TENS = dict(twenty=20, thirty=30, forty=40, fifty=50, sixty=60, seventy=70, eighty=80, ninety=90)


def number(text):
    return sum({**ONES, **TENS}[part] for part in text.split("-"))


def clock(text):
    """The last time of day that a request names, in minutes after midnight."""
    offset, hour, part = re.findall(r"(quarter past |half past |quarter to )?(\w+) in the (\w+)", text)[-1]
    minutes = number(hour) % 12 * 60 + {"": 0, "quarter past ": 15, "half past ": 30, "quarter to ": -15}[offset]
    return minutes % 720 + 720 * (part != "morning")


def length(text):
    """The length of time that a request names, in minutes."""
    for name, value in (("hour and a half", 90), ("half an hour", 30), ("quarter of an hour", 15), ("half a day", 720),
                        ("a day", 1440)):
        if name in text:
            return value
    count, unit = re.search(r"(\S+) (hours|minutes)", text).groups()
    return number(count) * {"hours": 60, "minutes": 1}[unit]


def test_a_call_has_in_digits_what_its_request_says_in_words():
    pairs, days = calls.pairs(0, 2000), "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
    assert len(dict(pairs)) == 2000 and {json.loads(call)["call"] for _, call in pairs} == {
        "restart", "mute", "power", "visit", "move", "lock", "ticket", "compare", "report"}
    for request, text in pairs:
        call = json.loads(text)
        assert calls.agrees(text, text) and not calls.agrees(text[:-1], text)
        cells = re.findall(r"[A-K]\d\d", text)
        assert len(set(cells)) == len(cells) and re.findall(r"[A-K]\d\d", request) in (cells, cells[::-1])
        at = call.get("at", call.get("from") if call["call"] == "lock" else None)
        if at:
            assert int(at[:2]) * 60 + int(at[3:]) == clock(request), request
        if "minutes" in call:
            assert call["minutes"] == length(request), request
        for key, unit in (("percent", "percent"), ("users", "(?:of its )?users")):
            if key in call:
                assert call[key] == number(re.search(rf"(\S+) {unit}", request)[1])
        assert "day" not in call or days[call["day"] - 1] in request
        assert "level" not in call or ("minor", "major", "critical")[call["level"] - 1] in request
