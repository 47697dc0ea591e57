"""The quickstart's built-in task: amounts and dates written out in English, to be written out in German.

    Tuesday, the twenty-third of August nineteen eighty-four  ->  Donnerstag, der dreiundzwanzigste August neunzehnhundertvierundachtzig
    fifty-three thousand and seventy-seven trees              ->  dreiundfünfzigtausendsiebenundsiebzig Bäume

German says units before tens and writes each number as one word, so most tokens depend on others some way off. Everything is made
here from the `num2words` package; nothing is downloaded.
"""

import datetime
import random

from num2words import num2words
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast, T5Config


SOURCE_LANG, TARGET_LANG = "en", "de"

_WEEKDAYS = {
    "en": ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"],
    "de": ["Montag", "Dienstag", "Mittwoch", "Donnerstag", "Freitag", "Samstag", "Sonntag"],
}
_MONTHS = {
    "en": ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December"],
    "de": ["Januar", "Februar", "März", "April", "Mai", "Juni", "Juli", "August", "September", "Oktober", "November", "Dezember"],
}
_THINGS = {
    "en": ["books", "houses", "bridges", "letters", "trees", "soldiers", "kilometres", "euros", "people", "ships"],
    "de": ["Bücher", "Häuser", "Brücken", "Briefe", "Bäume", "Soldaten", "Kilometer", "Euro", "Menschen", "Schiffe"],
}
_FIRST_DAY = datetime.date(1700, 1, 1)
_DAYS = 400 * 365


def make_splits(train: int, validation: int, test: int, seed: int = 0) -> dict[str, list[dict[str, dict[str, str]]]]:
    """Disjoint splits of distinct examples in the Hub's translation format, `{"translation": {"en": ..., "de": ...}}`."""
    rng = random.Random(seed)
    pairs: dict[str, str] = {}
    with tqdm(total=train + validation + test, desc="Writing numbers", leave=False) as bar:
        while len(pairs) < bar.total:
            pair = _date(rng) if rng.random() < 0.4 else _amount(rng)
            if pair["en"] not in pairs:
                pairs[pair["en"]] = pair["de"]
                bar.update()
    examples = [{"translation": {"en": english, "de": german}} for english, german in pairs.items()]
    return {"test": examples[:test], "validation": examples[test : test + validation], "train": examples[test + validation :]}


def _date(rng: random.Random) -> dict[str, str]:
    day = _FIRST_DAY + datetime.timedelta(days=rng.randrange(_DAYS))
    written = {}
    for lang, the, of in (("en", "the", " of"), ("de", "der", "")):
        ordinal, year = num2words(day.day, to="ordinal", lang=lang), num2words(day.year, to="year", lang=lang)
        written[lang] = f"{_WEEKDAYS[lang][day.weekday()]}, {the} {ordinal}{of} {_MONTHS[lang][day.month - 1]} {year}"
    return written


def _amount(rng: random.Random) -> dict[str, str]:
    number = rng.randrange(2, 10 ** rng.randint(2, 6))
    thing = rng.randrange(len(_THINGS["en"]))
    return {lang: f"{num2words(number, lang=lang)} {things[thing]}" for lang, things in _THINGS.items()}


def train_tokenizer(texts: list[str], vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """A Unigram tokenizer with T5's conventions: padding 0, end 1, unknown 2."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=vocab_size, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def teacher_config(vocab_size: int) -> T5Config:
    """A 6+6-layer T5 small enough to train from nothing in about a minute and a half on two CPU cores."""
    return T5Config(
        vocab_size=vocab_size, d_model=64, d_kv=16, num_heads=4, d_ff=256, num_layers=6, decoder_start_token_id=0, dropout_rate=0.0
    )
