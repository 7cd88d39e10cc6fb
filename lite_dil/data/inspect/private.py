"""Counts e-mail addresses, phone numbers and keys in texts; meant to miss some rather than to take a sum for a number."""

from __future__ import annotations

import re

_CODE = r"[2-9]\d{2}"  # a North American area code
_END = r"(?![\w%]|[-.]\d|\s*[=+*/])"  # no part of a sum or of a longer number
PRIVATE = {
    "e-mail addresses": re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,24}\b"),
    "phone numbers": re.compile(
        # +44 20 7946 0958; 212-555-0142, (212) 555-0142, 1-800-273-8255; 06 12 34 56 78; "phone: 5550142"
        rf"(?<![\w+.=])\+[1-9]\d{{0,2}}[ -]?(?:\(?\d{{1,4}}\)?[ -]?){{1,4}}\d{{2,4}}{_END}"
        rf"|(?<![\w+*/=.$-])(?:1[-. ])?(?:\({_CODE}\) ?\d{{3}}[-. ]|{_CODE}-\d{{3}}-|{_CODE}\.\d{{3}}\.)\d{{4}}{_END}"
        rf"|(?<![\w+*/=.,$-])0[1-9](?:[ .-]\d\d){{4}}{_END}"
        r"|(?i:\b(?:phone|telephone|tel|mobile|cell|fax|whatsapp)\b(?:(?: number)?(?: is)?\s?[:.]\s?| number(?: is)? | is ))"
        rf"\+?\(?\d[\d ().-]{{5,18}}\d{_END}"
    ),
    "keys or passwords": re.compile(
        r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY(?: BLOCK)?-----"
        r"|(?<![\w-])(?:sk-[\w-]{20,}|[sr]k_(?:live|test)_\w{16,}|(?:AKIA|ASIA)[A-Z0-9]{16}|gh[pousr]_[A-Za-z0-9]{30,}"
        r"|github_pat_\w{22,}|glpat-[\w-]{20,}|xox[abeoprs]-[\w-]{10,}|AIza[\w-]{35}|ya29\.[\w-]{20,}|hf_[A-Za-z0-9]{30,}"
        r"|npm_[A-Za-z0-9]{36}|pypi-[\w-]{40,}|SG\.[\w-]{16,}\.[\w-]{16,}|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,})(?![\w-])"
        r"|(?i:\b(?:api[ _-]?key|secret(?:[ _-]?(?:access[ _-]?)?key)?|(?:(?:access|auth)[ _-]?)?token|bearer|password"
        r"|passwd|pwd))"
        r"[\"']?(?:\s*[:=]\s*|\s+)[\"']?(?=[\w/+.-]*\d)(?=[\w/+.-]*[A-Za-z])[\w/+.-]{16,}"
        r"|\b[a-z][a-z0-9+]{1,20}://[^\s:/@]{1,64}:[^\s:/@]{3,64}@[\w.-]+"
    ),
}
# What every match has, so that most texts are not searched.
_HINT = {
    "e-mail addresses": re.compile("@"),
    "phone numbers": re.compile(r"\d[\d ().+-]{5,}\d|\d{7}"),
    "keys or passwords": re.compile(r"[\w/+.-]{16}|PRIVATE KEY|://"),
}


def private_in(text: str) -> dict[str, int]:
    """Return how often each kind of `PRIVATE` occurs in a text; kinds that do not occur are left out."""
    counts = {kind: len(pattern.findall(text)) for kind, pattern in PRIVATE.items() if _HINT[kind].search(text)}
    if counts.get("phone numbers"):  # seven digits are the least that a telephone number has
        numbers = PRIVATE["phone numbers"].findall(text)
        counts["phone numbers"] = sum(7 <= sum(map(str.isdigit, number)) <= 13 for number in numbers)
    return {kind: number for kind, number in counts.items() if number}
