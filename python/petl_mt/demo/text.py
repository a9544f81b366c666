"""Multi-parallel text made from the CLDR data that Babel carries: no download; the same seed, the same text.

A sentence is a template filled with phrases (a date, an amount of money, a list of countries ...). A phrase is a
content without a language; CLDR has the form in each language: word order, inflection and plurals.

    en  Finland, Kenya, and Japan – 3 weeks – Tuesday, March 4, 2031
    fi  Suomi, Kenia ja Japani – 3 viikkoa – tiistai 4. maaliskuuta 2031

The split. Every combination of atoms has a key: a calendar date, a time of day, an amount with its unit or
currency, two neighbours in a list, a number. A hash of the key (not the seed) puts it in train (70%), valid
(10%) or test (20%), and a sentence of a split uses the combinations of that split. So test lines have dates,
amounts and pairs of countries that no training line of any run has, while their words are training words (but
for numbers), and a parent trained with one seed has not seen the test lines of another.

    python -m petl_mt.demo.text --out text --pairs en-de,en-fr --train 5000 --valid 100 --test 200 --seed 1
"""

from __future__ import annotations

import argparse
import datetime as dt
import os
import random
import re
import unicodedata
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Literal, NamedTuple

from babel import Locale
from babel.core import get_global
from babel.dates import format_date, format_interval, format_skeleton, format_time, format_timedelta
from babel.lists import format_list
from babel.numbers import format_compact_decimal, format_currency, format_decimal, format_percent
from babel.units import format_compound_unit, format_unit

from petl_kernels.errors import InputError

LANGUAGES = ("en", "de", "fr", "cs", "ru", "fi", "tr", "ar", "hi", "ja")
SPLITS = ("train", "valid", "test")

TERRITORIES = (
    "AL AR AM AU AT AZ BD BE BO BA BR BG KH CM CA TD CL CN CO HR CU CY CZ DK EC EG EE ET FI FR GE DE GH "
    "GR GT HU IS IN ID IR IQ IE IT JM JP JO KZ KE KW LA LV LB LY LT LU MG MY ML MT MX MD MN MA MZ NA NP "
    "NL NZ NE NG NO OM PK PA PY PE PH PL PT QA RO RU RW SA SN RS SG SK SI SO ZA KR ES LK SD SE CH SY TJ "
    "TZ TH TN TR UG UA AE GB US UY UZ VE VN YE ZM ZW"
).split()
LANGUAGE_NAMES = (
    "af sq am ar hy az eu bn bg my ca zh hr cs da nl en et fi fr gl ka de el gu he hi hu is id ga it ja "
    "kn kk km ko ku lo la lv lt mk ms ml mt mr mn ne no fa pl pt pa ro ru sa sr sk sl so es sw sv ta te "
    "th tr uk ur uz vi cy yo zu"
).split()
CURRENCIES = (
    "EUR USD GBP JPY CNY CHF CZK RUB TRY INR SEK NOK DKK PLN HUF BRL MXN CAD AUD KRW EGP KES ZAR NGN ISK"
).split()
CITIES = (
    "Africa/Cairo Africa/Nairobi Africa/Lagos Africa/Algiers Africa/Johannesburg America/New_York "
    "America/Chicago America/Bogota America/Toronto America/Mexico_City America/Havana America/Lima "
    "America/Sao_Paulo Asia/Baghdad Asia/Bangkok Asia/Beirut Asia/Damascus Asia/Dubai Asia/Hong_Kong "
    "Asia/Jakarta Asia/Jerusalem Asia/Kabul Asia/Seoul Asia/Shanghai Asia/Singapore Asia/Tashkent "
    "Asia/Tehran Asia/Tokyo Australia/Sydney Europe/Athens Europe/Belgrade Europe/Berlin "
    "Europe/Brussels Europe/Bucharest Europe/Budapest Europe/Copenhagen Europe/Dublin Europe/Helsinki "
    "Europe/Istanbul Europe/Lisbon Europe/London Europe/Luxembourg Europe/Madrid Europe/Minsk "
    "Europe/Moscow Europe/Oslo Europe/Paris Europe/Prague Europe/Riga Europe/Rome Europe/Sofia "
    "Europe/Stockholm Europe/Vienna Europe/Vilnius Europe/Warsaw Europe/Zurich"
).split()
ZONES = (
    "Africa_Central Africa_Eastern America_Central America_Eastern America_Pacific Arabian Argentina "
    "Atlantic Australia_Eastern China Europe_Central Europe_Eastern Europe_Western India Indochina Iran "
    "Israel Japan Korea Moscow Pakistan Singapore"
).split()
MEASURES = (
    "length-kilometer length-meter length-centimeter length-millimeter length-mile length-foot "
    "length-light-year mass-kilogram mass-gram mass-tonne mass-pound volume-liter volume-milliliter "
    "volume-cubic-meter volume-teaspoon area-square-kilometer area-square-meter area-hectare "
    "temperature-celsius temperature-fahrenheit power-watt power-kilowatt power-horsepower "
    "energy-kilocalorie energy-kilowatt-hour electric-volt electric-ampere frequency-hertz "
    "frequency-megahertz pressure-hectopascal digital-gigabyte digital-megabyte angle-degree "
    "graphics-pixel speed-kilometer-per-hour speed-meter-per-second speed-knot "
    "consumption-liter-per-100-kilometer"
).split()
RATES = (
    ("length-meter", "duration-minute"),
    ("length-mile", "duration-day"),
    ("volume-liter", "duration-second"),
    ("volume-liter", "duration-hour"),
    ("mass-gram", "volume-liter"),
    ("mass-tonne", "duration-year"),
    ("digital-gigabyte", "duration-month"),
    ("digital-megabyte", "duration-second"),
    ("energy-kilocalorie", "duration-day"),
    ("length-kilometer", "duration-week"),
    ("mass-gram", "duration-day"),
)
DURATIONS = {"year": 30, "month": 24, "week": 52, "day": 90, "hour": 72, "minute": 90, "second": 90}
SECONDS = {
    "year": 31536000,
    "month": 2592000,
    "week": 604800,
    "day": 86400,
    "hour": 3600,
    "minute": 60,
    "second": 1,
}


@lru_cache(maxsize=1 << 20)
def split_of(key: str) -> str:
    """Returns the split in which a combination of atoms may appear: 70% train, 10% valid, 20% test, by its hash."""
    bucket = blake2b(key.encode(), digest_size=4).digest()[0] * 10 // 256
    return "train" if bucket < 7 else "valid" if bucket == 7 else "test"


class Phrase(NamedTuple):
    """The kind and the content of a phrase, for the function in ``RENDER`` that writes it in a language."""

    kind: str
    content: tuple


# ---- how a language writes each kind of phrase --------------------------------------------------------

RENDER: dict[str, Callable[..., str]] = {}


def _renders(function):
    RENDER[function.__name__.strip("_")] = function
    return function


@_renders
def _full_date(language, date):
    return format_date(date, "full", language)


@_renders
def _long_date(language, date):
    return format_date(date, "long", language)


@_renders
def _day_of_month(language, month, day):
    return format_skeleton("MMMMd", dt.date(2028, month, day), locale=language)


@_renders
def _month_of_year(language, month, year):
    return format_skeleton("yMMMM", dt.date(year, month, 1), locale=language)


@_renders
def _quarter(language, quarter, year):
    return format_skeleton("yQQQQ", dt.date(year, 3 * quarter - 1, 1), locale=language)


@_renders
def _interval(language, start, end):
    return format_interval(start, end, "yMMMd", locale=language)


@_renders
def _clock(language, hour, minute):
    return format_time(dt.time(hour, minute), "short", locale=language)


@_renders
def _clock_in_words(language, hour, minute):
    return format_skeleton("Bhm", dt.datetime(2028, 1, 1, hour, minute), locale=language)


@_renders
def _moment(language, date, hour, minute):
    pattern = Locale.parse(language).datetime_formats["long"]
    pattern = str(pattern).replace("'", "")
    return pattern.replace("{1}", _long_date(language, date)).replace("{0}", _clock(language, hour, minute))


@_renders
def _weekday(language, day):
    return Locale.parse(language).days["stand-alone"]["wide"][day]


@_renders
def _duration(language, parts):
    return _join(language, [_measure(language, n, f"duration-{unit}") for n, unit in parts], "unit")


@_renders
def _from_now(language, number, unit):
    delta = dt.timedelta(seconds=number * SECONDS[unit])
    return format_timedelta(delta, granularity=unit, threshold=1e9, add_direction=True, locale=language)


@_renders
def _measure(language, number, unit):
    return format_unit(number, unit, _length(language, unit), locale=language)


@_renders
def _rate(language, number, numerator, denominator):
    length = _length(language, numerator, denominator)
    return format_compound_unit(number, numerator, denominator_unit=denominator, length=length, locale=language)


@_renders
def _money(language, amount, currency):
    digits = {"currency_digits": False, "format": "#,##0.##"}
    return format_currency(amount, currency, locale=language, format_type="name", **digits)


@_renders
def _price(language, amount, currency):
    return format_currency(amount, currency, locale=language)


@_renders
def _percent(language, number):
    return format_percent(number / 100, locale=language)


@_renders
def _number(language, number):
    return format_decimal(number, locale=language)


@_renders
def _millions(language, number):
    length = "long" if "long" in Locale.parse(language).compact_decimal_formats else "short"
    return format_compact_decimal(number, format_type=length, locale=language)


@_renders
def _city(language, zone):
    names = Locale.parse(language).time_zones.get(zone, {})
    return names.get("city", zone.split("/")[-1].replace("_", " "))


@_renders
def _zone(language, zone, form):
    names = Locale.parse(language).meta_zones[zone]["long"]
    return names.get(form) or names["standard"]


@_renders
def _country(language, code):
    return Locale.parse(language).territories[code]


@_renders
def _language(language, code):
    return Locale.parse(language).languages[code]


@_renders
def _currency(language, code):
    return Locale.parse(language).currencies[code]


@_renders
def _place(language, zone):
    return f"{_city(language, zone)} ({_country(language, get_global('zone_territories')[zone])})"


@_renders
def _countries(language, codes, style):
    return _join(language, [_country(language, c) for c in codes], style)


@_renders
def _languages(language, codes, style):
    return _join(language, [_language(language, c) for c in codes], style)


@_renders
def _cities(language, zones, style):
    return _join(language, [_city(language, z) for z in zones], style)


@cache
def _length(language: str, *units: str) -> Literal["long", "short"]:
    """Returns the longest form in which the language has these units; of two equal ones CLDR keeps the shorter."""
    names = Locale.parse(language)._data["unit_patterns"]
    forms: tuple[Literal["long", "short"], ...] = ("long", "short")
    return next(form for form in forms if all("other" in names[unit].get(form, {}) for unit in units))


def _join(language: str, items: list[str], style: Literal["standard", "or", "unit"]) -> str:
    if len(items) == 1:
        return items[0]
    patterns = Locale.parse(language).list_patterns.get(style, {})  # incomplete for some languages
    complete = "2" in patterns and "start" in patterns and "end" in patterns
    return format_list(items, style if complete else "standard", locale=language)


_MARKS = re.compile("[\u200e\u200f\u061c]")  # direction marks: invisible, and sentence pieces would learn them


def render(phrase: Phrase, language: str) -> str:
    """Returns the phrase in a language, without direction marks."""
    text = RENDER[phrase.kind](language, *phrase.content)
    return unicodedata.normalize("NFC", " ".join(_MARKS.sub("", text).split()))


# ---- the contents of phrases --------------------------------------------------------------------------------


class Draw:
    """Draws phrases whose combinations all belong to one split."""

    def __init__(self, rng: random.Random, split: str):
        self.rng, self.split = rng, split

    def _until(self, name: str, propose: Callable[[], tuple]) -> tuple:
        """Returns the first of the proposed contents that is of this split."""
        while True:
            content = propose()
            if split_of(" ".join(map(str, (name, *content)))) == self.split:
                return content

    def _date(self) -> dt.date:
        first, days = dt.date(1960, 1, 1), 32000
        return self._until("date", lambda: (first + dt.timedelta(self.rng.randrange(days)),))[0]

    def _time(self) -> tuple[int, int]:
        """Returns hour and minute, the latter more often a multiple of five."""
        minute = lambda: self.rng.randrange(12) * 5 + self.rng.choice((0, 0, 0, 1, 2, 3, 4))  # noqa: E731
        return self._until("time", lambda: (self.rng.randrange(24), minute()))

    def _amount(self, units) -> tuple:
        """Returns a number, small ones more often, and a unit."""

        def propose():
            number = self.rng.randint(1, self.rng.choice((20, 99, 999)))
            if self.rng.random() < 0.2:
                number += self.rng.randrange(1, 10) / 10
            return number, self.rng.choice(units)

        return self._until("amount", propose)

    def _chain(self, items, key: str, longest: int) -> tuple:
        """Returns different items; each two neighbours are a pair of this split."""
        length = self.rng.randint(2, longest)
        chain = [self.rng.choice(items)]
        tries = 0
        while len(chain) < length:
            item, tries = self.rng.choice(items), tries + 1
            if item not in chain and split_of(f"{key} {sorted((chain[-1], item))}") == self.split:
                chain.append(item)
            elif tries % 100 == 0:  # the last one may have no neighbour in this split
                chain = [item]
        return tuple(chain)

    def _style(self) -> str:
        return self.rng.choice(("standard", "standard", "or"))

    # Slots of the templates: each returns a phrase.
    def date(self) -> Phrase:
        month, year = (lambda: self.rng.randint(1, 12)), (lambda: self.rng.randint(1950, 2049))
        forms = ("full_date", "full_date", "long_date", "day_of_month", "month_of_year", "quarter")
        form = self.rng.choice(forms)
        if form == "day_of_month":
            return Phrase(form, self._until("day", lambda: (month(), self.rng.randint(1, 29))))
        if form == "month_of_year":
            return Phrase(form, self._until("month", lambda: (month(), year())))
        if form == "quarter":
            return Phrase(form, self._until("quarter", lambda: (self.rng.randint(1, 4), year())))
        return Phrase(form, (self._date(),))

    def moment(self) -> Phrase:
        return Phrase("moment", (self._date(), *self._time()))

    def interval(self) -> Phrase:
        while True:
            start = self._date()
            end = start + dt.timedelta(self.rng.randint(1, self.rng.choice((28, 28, 800))))
            if split_of(f"date {end}") == self.split:
                return Phrase("interval", (start, end))

    def time(self) -> Phrase:
        return Phrase(self.rng.choice(("clock", "clock_in_words")), self._time())

    def weekday(self) -> Phrase:
        return Phrase("weekday", (self.rng.randrange(7),))

    def duration(self) -> Phrase:
        first, length = self.rng.randrange(len(DURATIONS)), self.rng.choice((1, 1, 2, 3))
        units = list(DURATIONS)[first : first + length]
        parts = [self._until("amount", lambda u=u: (self.rng.randint(1, DURATIONS[u]), u)) for u in units]
        return Phrase("duration", (tuple(parts),))

    def from_now(self) -> Phrase:
        unit = self.rng.choice(list(DURATIONS))
        number = lambda: self.rng.choice((-1, 1)) * self.rng.randint(2, DURATIONS[unit])  # noqa: E731
        return Phrase("from_now", self._until("from now", lambda: (number(), unit)))

    def measure(self) -> Phrase:
        return Phrase("measure", self._amount(MEASURES))

    def rate(self) -> Phrase:
        number, units = self._amount(RATES)
        return Phrase("rate", (number, *units))

    def money(self) -> Phrase:
        return Phrase("money", self._amount(CURRENCIES))

    def price(self) -> Phrase:
        return Phrase("price", self._amount(CURRENCIES))

    def percent(self) -> Phrase:
        return Phrase("percent", self._until("percent", lambda: (self.rng.randint(1, 100),)))

    def number(self) -> Phrase:
        if self.rng.random() < 0.5:
            return Phrase("number", self._until("number", lambda: (self.rng.randint(1000, 99999),)))
        power = lambda: self.rng.choice((1000, 10**6, 10**9))  # noqa: E731
        return Phrase("millions", self._until("number", lambda: (self.rng.randint(2, 99) * power(),)))

    def country(self) -> Phrase:
        return Phrase("country", (self.rng.choice(TERRITORIES),))

    def city(self) -> Phrase:
        return Phrase("city", (self.rng.choice(CITIES),))

    def place(self) -> Phrase:
        return Phrase("place", (self.rng.choice(CITIES),))

    def zone(self) -> Phrase:
        return Phrase("zone", (self.rng.choice(ZONES), self.rng.choice(("standard", "daylight", "generic"))))

    def language(self) -> Phrase:
        return Phrase("language", (self.rng.choice(LANGUAGE_NAMES),))

    def currency(self) -> Phrase:
        return Phrase("currency", (self.rng.choice(CURRENCIES),))

    def countries(self) -> Phrase:
        return Phrase("countries", (self._chain(TERRITORIES, "countries", 4), self._style()))

    def languages(self) -> Phrase:
        return Phrase("languages", (self._chain(LANGUAGE_NAMES, "languages", 4), self._style()))

    def cities(self) -> Phrase:
        return Phrase("cities", (self._chain(CITIES, "cities", 3), self._style()))


# Each template has at least one slot with a combination, so no sentence of one split can stand in another.
TEMPLATES = """
{date}
{moment}
{interval}
{countries}
{languages}
{cities}
{from_now}
{duration}
{date}, {time}
{weekday}, {time}
{city}, {date}
{city}, {moment}
{city}: {measure}, {percent}
{place}, {date}
{place} – {measure}
{cities}: {duration}
{cities} – {date} – {price}
{cities} ({zone}): {time}
{country}: {languages}
{country}: {number} ({percent})
{country} ({languages}), {date}
{country} – {rate} – {percent}
{country}, {interval}: {money}
{countries} – {duration} – {date}
{countries}: {percent}, {from_now}
{countries} ({currency}), {interval}
{countries}: {money} – {languages}
{countries}, {moment}
{countries} – {measure} – {rate}
{language} – {countries} ({date})
{languages}: {countries}
{languages} ({city}, {weekday}, {time})
{languages} – {duration}
{currency}: {price}
{currency} ({country}): {money}, {date}
{date}: {countries} – {number}
{date} – {date}: {languages}
{date}, {time} ({zone})
{weekday}, {time}: {measure}
{weekday}: {cities} – {duration}
{interval}: {cities}; {percent}
{interval} ({duration}): {money}
{moment} ({zone}): {measure}
{moment} – {place}: {price}
{from_now}: {money}
{from_now}, {time}: {languages}
{duration}: {measure}, {measure}
{duration} – {price} – {city}
{measure}: {price}; {measure}: {price}
{measure} – {rate}
{money}; {percent}; {from_now}
{number} – {country}, {date}
{percent}: {languages}
{zone}: {time} – {time}
{zone} – {place}: {from_now}
{countries} – {languages} – {cities}: {date}
{place}, {date}, {time}: {money} – {percent}
{weekday}, {time}, {city} ({zone}): {measure}, {rate}
{interval}: {countries} ({languages}) – {price}, {number}
{country}: {percent}; {country}: {percent}; {country}: {percent}
{moment} – {moment} ({zone}): {duration}, {rate}
{languages} ({percent}) – {languages} ({percent}) – {countries}
{cities}: {from_now}, {duration}; {cities}: {date}
{currency} – {countries}: {money}, {price} ({from_now})
{date} – {measure}, {measure}, {measure} – {city}
""".strip().splitlines()


class Sentence(NamedTuple):
    """A template (text around numbered slots) and the phrases of its slots."""

    pieces: tuple[str, ...]
    phrases: tuple[Phrase, ...]

    def text(self, language: str) -> str:
        """Returns the sentence in a language."""
        comma = {"ar": "، ", "ja": "、"}.get(language, ", ")
        out = [self.pieces[0]]
        for phrase, after in zip(self.phrases, self.pieces[1:], strict=True):
            out += [render(phrase, language), after.replace(", ", comma)]
        return "".join(out)


_SLOT = re.compile(r"\{(\w+)\}")


def sentences(split: str, seed: int | str) -> Iterator[Sentence]:
    """Yields sentences of one split without end, determined by the seed."""
    rng = random.Random(f"{split} {seed}")
    draw = Draw(rng, split)
    while True:
        template = rng.choice(TEMPLATES)
        phrases = tuple(getattr(draw, slot)() for slot in _SLOT.findall(template))
        yield Sentence(tuple(_SLOT.sub("\0", template).split("\0")), phrases)


def parallel_lines(languages: tuple[str, ...], split: str, count: int, seed: int | str) -> list[tuple[str, ...]]:
    """Returns ``count`` rows: a sentence (3 to 25 English words) in each language; none stands twice in a language."""
    for language in languages:
        if language not in LANGUAGES:
            raise InputError(f"no demo text in language {language!r}: expected one of {', '.join(LANGUAGES)}")
    if split not in SPLITS:
        raise InputError(f"unknown split {split!r}: expected one of {', '.join(SPLITS)}")
    seen: list[set[str]] = [set() for _ in languages]
    rows: list[tuple[str, ...]] = []
    for sentence in sentences(split, seed):
        if len(rows) >= count:
            break
        if not 3 <= len(sentence.text("en").split()) <= 25:
            continue
        row = tuple(sentence.text(language) for language in languages)
        if any(text in known for text, known in zip(row, seen, strict=True)):
            continue
        for text, known in zip(row, seen, strict=True):
            known.add(text)
        rows.append(row)
    return rows


def write_pair(out: Path, pair: str, train: int, valid: int, test: int, seed: int) -> dict[str, tuple[Path, Path]]:
    """Writes `<split>.<pair>.<language>` for the three splits; returns the two paths of each split.

    Training lines differ from pair to pair; validation and test lines are the same sentences for all of them.
    """
    source, _, target = pair.partition("-")
    paths = {}
    out.mkdir(parents=True, exist_ok=True)
    for split, count in zip(SPLITS, (train, valid, test), strict=True):
        split_seed = f"{seed} {pair}" if split == "train" else seed
        rows = parallel_lines((source, target), split, count, split_seed)
        paths[split] = tuple(out / f"{split}.{pair}.{language}" for language in (source, target))
        for side, path in enumerate(paths[split]):
            _write_lines(path, [row[side] for row in rows])
    return paths


def write_vocabulary_text(out: Path, languages: tuple[str, ...], count: int, seed: int) -> list[Path]:
    """Writes `vocabulary.<language>`: training sentences, for a SentencePiece model of all the languages."""
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for language in languages:
        path = out / f"vocabulary.{language}"
        _write_lines(path, [row[0] for row in parallel_lines((language,), "train", count, f"{seed} vocabulary")])
        paths.append(path)
    return paths


def _write_lines(path: Path, lines: list[str]) -> None:
    temporary = path.with_name(path.name + ".part")
    temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    os.replace(temporary, path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m petl_mt.demo.text", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--pairs", required=True, help="for example en-de,en-fr; languages: " + " ".join(LANGUAGES))
    parser.add_argument("--train", type=int, default=5000, help="training lines of each pair")
    parser.add_argument("--valid", type=int, default=200)
    parser.add_argument("--test", type=int, default=200)
    parser.add_argument("--vocabulary", type=int, default=0, help="lines of each language for a SentencePiece model")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    for pair in args.pairs.split(","):
        write_pair(args.out, pair, args.train, args.valid, args.test, args.seed)
    if args.vocabulary:
        write_vocabulary_text(args.out, LANGUAGES, args.vocabulary, args.seed)


if __name__ == "__main__":
    main()
