# SPDX-License-Identifier: Apache-2.0
"""Published packages of recorded speech and music; `moeapps data prepare recordings` fetches all of them."""

from __future__ import annotations

from moeapps.data.archives import Package

_USED_BY = ("configs/data/recordings.yaml",)
_SOUNDS = "usr/share/asterisk/sounds"
_CORE = "Asterisk's core sounds 1.6.1"


def _doc(package: str, file: str) -> str:
    return f"usr/share/doc/{package}/{file}"


def _speech(language: str, folder: str, sha256: str, size: int, who: str, licence: str) -> Package:
    name = f"asterisk-core-sounds-{language}-wav"
    return Package(
        name=name,
        version="1.6.1-1",
        kind="debian",
        sha256=sha256,
        size=size,
        licence=f"{_CORE}, recorded by {who}: {licence}",
        members=(f"{_SOUNDS}/{folder}/*.wav", _doc(name, "copyright")),
        description=f"telephone prompts in {language}, 8 kHz, 24 to 31 minutes",
        used_by=_USED_BY,
        source=f"Debian, {name}, /{_SOUNDS}/{folder}",
    )


def _words(language: str, sha256: str, size: int) -> Package:
    name = f"asterisk-core-sounds-{language}"
    return Package(
        name=name,
        version="1.6.1-1",
        kind="debian",
        sha256=sha256,
        size=size,
        licence=f"{_CORE}: CC-BY-SA-3.0 (it, ru: CC-BY-3.0), as its copyright file says",
        members=(_doc(name, f"core-sounds-{language}.txt.gz"), _doc(name, "copyright")),
        description=f"what the prompts in {language} say",
        used_by=_USED_BY,
        source=f"Debian, {name}, /{_doc(name, f'core-sounds-{language}.txt.gz')}",
    )


SPEECH: dict[str, Package] = {
    "en": _speech(
        "en",
        "en_US_f_Allison",
        "2be3ea287d83299d143815fa804f11179a75b7affd4a758b98b55f5afc18a35d",
        18_272_864,
        "Allison Smith",
        "CC-BY-SA-3.0",
    ),
    "es": _speech(
        "es",
        "es_MX_f_Allison",
        "9283a09a6d56fccdcc2bcfe86c48f0f844289cfbd46a3184d8785a6f7f569903",
        23_767_256,
        "Allison Smith",
        "CC-BY-SA-3.0",
    ),
    "fr": _speech(
        "fr",
        "fr_CA_f_June",
        "8d4e1bc32ed5ba7fbda40841ca1825ed20cc6232724a473c90f8bb0e53e6073e",
        18_516_060,
        "June Wallack",
        "CC-BY-SA-3.0",
    ),
    "it": _speech(
        "it",
        "it_IT_m_Carlo",
        "5a26638089e134b8ac39363fe249c5c93c50cd8bfdc9b2499ae61ec4a35e2fcb",
        18_262_124,
        "Carlo Flora",
        "CC-BY-3.0",
    ),
    "ru": _speech(
        "ru",
        "ru_RU_f_IvrvoiceRU",
        "ccbfaebfa450b7a9ddf644ae0f3d1e9017d5df7c0aebe816e946345589d38201",
        18_788_860,
        "ivrvoice.ru",
        "CC-BY-3.0",
    ),
    "it_menardi": Package(
        name="asterisk-prompt-it-menardi-wav",
        version="1:1.4.22+mm20110907-3.1",
        kind="debian",
        sha256="3094530d98f8758ac275572d59624c41f60969fef883f34f4886d144f3dfeb21",
        size=18_776_300,
        licence="Marco Menardi and Paola Dal Zot (the voice), http://www.voip.ammdomus.it: CC-BY-SA-3.0 (Italy)",
        members=(f"{_SOUNDS}/it_IT_f_Menardi/*.wav", _doc("asterisk-prompt-it-menardi-wav", "copyright")),
        description="telephone prompts in Italian by another voice, 8 kHz, 25 minutes",
        used_by=_USED_BY,
        source=f"Debian, asterisk-prompt-it-menardi-wav, /{_SOUNDS}/it_IT_f_Menardi",
    ),
}
WORDS: dict[str, Package] = {
    "en": _words("en", "973e797d28e37fa6ca3c0a9d6fa717e77cf1268ae916bf09fd3503113cdffa50", 22_844),
    "es": _words("es", "9afdab7f559f036649fb406e625899306ca1004df8ebe39c30bfbd5912d66f74", 22_012),
    "fr": _words("fr", "04c82c78c570c43a7136cbc5e2488d0c470b775468dff9fbce4a131b18cf1056", 23_152),
    "it": _words("it", "3884d9457e12f21caa018c18f0d587df5d53ebea14b673d8453a134c5941ab3b", 23_972),
    "ru": _words("ru", "28a61616bb0cd3345a7ea532dec4df9f071e5d0fa9f8c1a563ea9669002f39ab", 25_592),
}
MUSIC = Package(
    name="asterisk-moh-opsound-wav",
    version="2.03-1.1",
    kind="debian",
    sha256="8f9d808a729d305c2d3343993f21ca5e6829e411682618dc8ea7aa8bc24a566c",
    size=13_969_212,
    licence="Paul Shuler (Macroform), Manolo Camp, Reno Project: CC-BY-SA-3.0",
    members=("usr/share/asterisk/moh/*.wav", _doc("asterisk-moh-opsound-wav", "copyright")),
    description="five pieces of music by three artists, 8 kHz, 18 minutes",
    used_by=_USED_BY,
    source="Debian, asterisk-moh-opsound-wav, /usr/share/asterisk/moh",
)

PACKAGES: tuple[Package, ...] = (*SPEECH.values(), *WORDS.values(), MUSIC)
