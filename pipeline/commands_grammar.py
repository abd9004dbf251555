"""A grammar of spoken commands: the built-in data of ``layerbank demo``, made offline from a seed.

Every sentence carries an intent and IOB2 slots. It is written to need the context: a name can be a
contact, an artist, a place or a restaurant, and a number a time or a party; intents share their verbs;
and phrases around a command hold words that look like slots and are none. A filler belongs to one split
only, whatever slot it fills, and dev and test also use wordings that training never shows.

It knows nothing of encoders, banks or heads.
"""

import random
import re
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from pipeline.errors import PipelineError

SPLITS = ("train", "dev", "test")
HELD_OUT_FRAC = 0.15  # share of every pool of fillers that goes to dev, and as much to test
NEW_WORDING_EVERY = 4  # in dev and test, one row in so many of an intent has a wording of that split alone
PREFIX_FRAC = 0.3  # share of rows with a phrase before the command
SUFFIX_FRAC = 0.2  # share of rows with a phrase after it


def _list(text: str) -> tuple[str, ...]:
    return tuple(" ".join(entry.split()) for entry in text.split(","))


def _pairs(first: str, second: str) -> tuple[str, ...]:
    return tuple(f"{a} {b}".strip() for a, b in product(_list(first), _list(second)))


HOURS = _list("one, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve")
MONTHS = _list("january, march, april, may, june, july, september, october, november")
DAYS = _list("monday, tuesday, wednesday, thursday, friday, saturday, sunday")

# No string stands in two pools: what several slots share is a pool that all of them name.
POOLS: Mapping[str, tuple[str, ...]] = {
    "name": _list(
        """jordan, austin, sydney, florence, madison, paris, carter, dallas, georgia, victoria, adelaide,
        chelsea, brooklyn, savannah, phoenix, lincoln, houston, charlotte, kenya, india, vienna,
        verona, siena, valencia, kingston, preston, weston, clifton, milan, chester, lancaster, troy,
        memphis, denver, camden, devon, ashton, carson, hudson, logan, raleigh, salem, trenton,
        aurora, helena, augusta, regina, alexandria, santiago, san diego, san antonio, lorenzo,
        orlando, cordoba, jackson, marseille, asia, virginia, carolina, dakota, jamal, marco, lucy,
        peter, nina, oscar, simon, clara, victor, hannah, felix, martha, tyler, judith, rafael, bella,
        kennedy, monroe, franklin, wilson, cleveland, beverly, maryland, tobias, eugene, abilene,
        darwin, perth"""
    ),
    "shade": _list(
        """rose, violet, amber, ruby, hazel, scarlet, olive, jade, coral, ginger, indigo, ivory, saffron,
        sienna, crimson, lavender, teal, jasmine, cherry, peach, sage, cinnamon, honey, plum"""
    ),
    "tint": _list(
        """warm white, deep blue, soft pink, pale green, bright yellow, orange, purple, dark red,
        daylight, sunset orange, sky blue, candle light"""
    ),
    "person": _list(
        """my sister, grandma, uncle ben, doctor morris, the plumber, aunt mara, priya, tomasz, my
        landlord, yusuf, the school office, my brother, dad, coach adams, ingrid, mister okafor, my
        boss, the vet, fatima, kenji, my neighbour, aoife, the babysitter, mum, professor lind, bruno,
        my flatmate, the dentist, misses park, anya"""
    ),
    "sign": _pairs(
        "the copper, the blue, the red, the old, the golden, the quiet, the hungry, the paper, the iron",
        "kettle, door, lantern, mill, rabbit, engines, harbour, wolves, bell, garden, sparrow, pilgrims",
    ),
    "title": (
        *_pairs(
            "walking, waiting, dancing, falling, dreaming, running",
            "home alone, in the rain, until monday, with no shoes, on the moon, all winter, back to you",
        ),
        *_list(
            """silver river, two more minutes, call me tomorrow, monday again, lights out, seven days,
            half past nothing, message in the sand, rain on friday, ten miles to go, coffee and salt,
            send no flowers, the last alarm, dinner for nobody, kitchen floor, book of hours, say it
            in french, tell the others, take me anywhere"""
        ),
    ),
    "tongue": _list(
        """italian, french, spanish, greek, turkish, japanese, korean, thai, portuguese, vietnamese,
        polish, hungarian, swedish, german, persian, malay, georgian, russian, ukrainian, danish,
        dutch, irish, mandarin, bengali, punjabi"""
    ),
    "spot": _list(
        """harbour street, the airport, the train station, north bridge, oslo, lisbon, nairobi, the city
        library, king square, lake road, bergen, the stadium, riverside park, cusco, the museum of
        glass, reykjavik, mill lane, the old town, tampere, the ferry terminal, porto, the shopping
        centre, baker hill, gdansk, the zoo, quito"""
    ),
    "note": (
        *_pairs(
            "i am, we are, the children are, the guests are, you are",
            "late, in the garden, at the station, not hungry, on the way home, ready to eat, out of milk,"
            "waiting in the car, leaving at noon, stuck in traffic, at the doctor, already asleep",
        ),
        *_pairs(
            "the train, the meeting, my taxi, the soup, the table, the blue folder",
            "is late, was cold, is at the office, was too expensive, is booked, comes on monday",
        ),
        *_list(
            """good morning, happy birthday, where is the station, how much does it cost, i like italian
            food, i will call you tomorrow, thank you for the flowers, can you feed the cat, see you
            on monday, good luck, i am allergic to nuts, i left my keys in the kitchen, what time do
            you close, i miss you, well done, my alarm did not ring, i forgot the list, two coffees
            and a tea, one ticket to the museum, no sugar for me"""
        ),
    ),
    "thing": (
        *_pairs(
            "fresh, cheap, white, green, some, a bag of, two boxes of",
            "bread, apples, onions, rice, tea, batteries, paper, cheese, potatoes, soap, pasta, cookies",
        ),
        *_list(
            """oat milk, six lemons, blue paint, light bulbs, olive oil, dog food, tomatoes, an alarm
            clock, butter, a card, turkey, toothpaste, spaghetti, garden gloves, frozen peas, french
            fries, baby carrots, a phone charger, sun cream, roast beef, eggs, cereal, salmon,
            lettuce, a cake, yogurt, ham, candles, popcorn, mushrooms"""
        ),
    ),
    "theme": _list(
        """shopping, grocery, packing, birthday, weekend, camping, wish, hardware, party, school,
        holiday, picnic, pharmacy, moving, christmas, travel, baking, cleaning, baby, wedding, summer,
        barbecue, guest, urgent, daily, family, breakfast, dinner, christmas gift, weekly shopping,
        long term, hiking, market, work, return, chores"""
    ),
    "area": (
        *_pairs(
            ", upstairs, downstairs, small, big, back",
            "kitchen, garden, office, bathroom, garage, bedroom, hall, study",
        ),
        *_list(
            """nursery, attic, living room, cellar, balcony, guest room, dining room, laundry room, front
            porch, terrace, pantry, workshop, master bedroom, playroom, basement, stairs"""
        ),
    ),
    "event": (
        *_pairs(
            "yoga, piano, spanish, swimming, chess, cooking, football, choir",
            "class, lesson, practice, meeting, club, exam",
        ),
        *_list(
            """dentist appointment, parents evening, team lunch, haircut, book club, flight to porto, job
            interview, budget review, car inspection, anniversary dinner, movie night, garden party,
            physio, board meeting, early shift, bus tour, night train, tax deadline, staff drinks, eye
            test, house viewing, radio show"""
        ),
    ),
    "number": HOURS[1:],
    "clock": tuple(
        form.format(hour)
        for form, hour in product(
            (
                "{} am",
                "{} pm",
                "{} thirty",
                "half past {}",
                "quarter to {}",
                "{} in the morning",
                "{} o'clock",
            ),
            HOURS,
        )
    ),
    "day": (
        *_list(
            "today, tomorrow, tonight, the day after tomorrow, christmas eve, new year's day, the weekend"
        ),
        *(form.format(day) for form, day in product(("{}", "next {}", "this {}"), DAYS)),
        *(form.format(month) for form, month in product(("the third of {}", "{} ninth"), MONTHS)),
    ),
    "span": (
        *(
            f"{n} {unit}"
            for n, unit in product((*HOURS[1:], "fifteen", "forty five"), ("minutes", "hours"))
        ),
        *_list("half an hour, a quarter of an hour, an hour and a half, ninety seconds, a minute, an hour"),
    ),
    "crowd": (
        *(form.format(n) for form, n in product(("{} people", "a party of {}", "{} of us"), HOURS[1:9])),
        *_list("just me, the whole team, my wife and me, two adults and a child"),
    ),
}

SLOTS: Mapping[str, tuple[str, ...]] = {
    "artist": ("name", "sign"),
    "song": ("title", "shade"),
    "place": ("spot", "name"),
    "restaurant": ("sign", "name"),
    "cuisine": ("tongue",),
    "language": ("tongue",),
    "contact": ("person", "name"),
    "message": ("note",),
    "phrase": ("note",),
    "item": ("thing",),
    "list": ("theme", "area"),
    "room": ("area",),
    "color": ("shade", "tint"),
    "event": ("event",),
    "date": ("day",),
    "time": ("clock", "number"),
    "duration": ("span",),
    "people": ("crowd", "number"),
}

# For each intent: wordings of every split, of dev alone, of test alone. (a|b)
# is one of the two; {-slot} is filled and left untagged.
WORDINGS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "play_music": (
        (
            "(play|start|put on) {song} by {artist}",
            "(play|put on|i would like|find) (something|some music|an album|the latest) by {artist}",
            "(play|start|i want) the (song|track) {song} in the {room}",
            "(i want to hear|let us hear|let me hear) {artist} in the {room}",
            "(start|play|put on) {song} from the (last|first) album of {artist}",
            "(put|turn) {song} on in the {room}",
            "(play|put on) (songs|music|tracks) (of|from) {artist} for {duration}",
        ),
        ("find me the new one by {artist} and play it", "let me listen to {song} in the {room}"),
        ("get some {artist} music going in the {room}", "turn up {song} by {artist}"),
    ),
    "set_alarm": (
        (
            "wake (me|us) (up|) at {time}",
            "(set|make|put on) an alarm (for|at) {time} (on|) {date}",
            "wake me (up|) in {duration}",
            "i (need|want|have) to be up (by|at) {time} {date}",
            "(set|i need|give me) an alarm for (the|my) {event} at {time}",
            "(put|turn) an alarm on for {date} at {time}",
            "(get me up|get me out of bed) {date} (before|at) {time}",
        ),
        ("make it ring at {time} for the {event}", "the alarm goes off {date} at {time}"),
        ("do not let me sleep past {time}", "i want to be woken {date} at {time}"),
    ),
    "get_weather": (
        (
            "what is the weather (like|) in {place} {date}",
            "(tell me|check|show me) if it will (rain|snow|be sunny) in {place} (at {time}|{date})",
            "how (warm|cold|windy) is it in {place} (at|around) {time}",
            "do i need (a coat|an umbrella|boots) (for|in) {place} {date}",
            "(show|get|tell me|what is) the (forecast|temperature) (for|on) {date}",
            "how does the sky look (in|over) {place} (at {time}|{date})",
            "will it (rain|freeze|be hot) (at|by) {time} in {place}",
        ),
        ("is it going to snow around {place} by {time}", "find out how windy {place} gets {date}"),
        ("give me the temperature over in {place}", "will {date} be sunny in {place}"),
    ),
    "book_table": (
        (
            "(book|get|reserve) a table for {people} at {restaurant}",
            "(book|reserve|try) {restaurant} (for|at) {time} {date}",
            "(get|find|book) (me|us) a table for {people} at {time}",
            "(find|get|i need) a {cuisine} (place|restaurant) for {people} (in|near) {place}",
            "(book|reserve) (seats at|dinner at|lunch at|) {restaurant} in {place} for {people}",
            "(i want|we want|let us have) {cuisine} food {date} for {people}",
            "(put|set) {people} down for {time} at {restaurant}",
        ),
        ("ask {restaurant} for a table at {time}", "see if {restaurant} can seat {people} {date}"),
        ("we would like to eat {cuisine} at {time}", "take a table at {restaurant} {date} for {people}"),
    ),
    "send_message": (
        (
            "tell {contact} (that|) {message}",
            "(send|write|text) {message} to {contact}",
            "(text|write|message|tell) {contact} that {message}",
            "send (a message|a text|a note) to {contact} saying {message}",
            "let {contact} know (that|) {message}",
            "(say|text) {message} to {contact}",
        ),
        ("write to {contact} and say {message}", "{contact} should know that {message}"),
        ("pass on to {contact} that {message}", "drop {contact} a line saying {message}"),
    ),
    "navigate": (
        (
            "(take|get|bring|drive) me to {place}",
            "how do i get to {place} (by {time}|{date}|)",
            "(get me|how far is it|how long is it|show the way) from {place} to {place}",
            "(drive|take me|get me) to where {contact} lives",
            "show (me|) the way to {restaurant} for (the|my) {event}",
            "(start|plan|find) the (route|way|drive) to {place}",
            "(drive|walk|take me) (past|through) {place} to {restaurant}",
        ),
        ("i have to be in {place} at {time} so guide me", "find the fastest road out of {place}"),
        ("give me directions from {place} to {restaurant}", "bring me over to {contact} in {place}"),
    ),
    "set_timer": (
        (
            "(set|start|make) (a|the) timer (for|of) {duration}",
            "(remind|stop|tell) me in {duration}",
            "(start|set) a {duration} timer for the {item}",
            "(give me|i need) {duration} (for the {item}|on the clock)",
            "(set|put) {duration} on the timer",
            "tell me when {duration} are (over|up|gone)",
            "(check|turn) the {item} in {duration}",
        ),
        ("count down {duration} in the {room}", "put the timer on for {duration} for the {item}"),
        ("let me know after {duration}", "the {item} must come out in {duration}"),
    ),
    "add_to_list": (
        (
            "(add|put|write) {item} (to|on) (the|my) {list} list",
            "put {item} (down|) on my {list} list",
            "we (need|want|are out of) {item} for the {list} list",
            "(remind|tell) me to (get|buy|bring) {item} {date}",
            "i (have|want|need) to (buy|get) {item} {date}",
            "(add|get) {item} and {item} (to|for) (the|my) {list} list",
            "the {list} list (needs|is missing) {item}",
        ),
        ("note down {item} on the {list} list", "the {list} list should have {item} on it"),
        ("write {item} on the list called {list}", "do not let me forget {item} {date}"),
    ),
    "control_light": (
        (
            "(turn|make) the (lamp|light) in the {room} {color}",
            "set the {room} (light|lights|) to {color}",
            "(turn|switch) (off|on) the lights in the {room} at {time}",
            "(make|have) it {color} in the {room} (at {time}|)",
            "(put|turn|switch) {color} on in the {room}",
            "(i want|give me) {color} light for {duration}",
            "(light up|make it bright in|dim) the {room} {date} at {time}",
        ),
        ("change the lamp in the {room} into {color}", "let the {room} glow in {color} until {time}"),
        ("give the {room} a bit of {color} light", "start {color} light in the {room} for {duration}"),
    ),
    "add_event": (
        (
            "(add|put|set up) {event} with {contact} (on|for) {date}",
            "(put|write|add) {event} in my calendar for {date} at {time}",
            "remind me (of|about) (the|my) {event} {date} (at {time}|)",
            "(set up|plan|book) (a|the) {event} in {place} at {time}",
            "i (have|will have) {event} with {contact} at {time}",
            "(book|plan|add) {event} (on|for) {date} for {duration}",
            "(move|put) the {event} to {date}",
        ),
        ("save {date} for {event} with {contact}", "make a note that {event} is at {time}"),
        ("block {duration} {date} for {event}", "the {event} with {contact} is on {date}"),
    ),
    "call": (
        (
            "(call|phone|ring) {contact} (on speaker|now|)",
            "get {contact} on the (phone|line)",
            "(call|phone|ring) {contact} about the {event}",
            "(ring|call) {contact} at {time} (in the {room}|)",
            "i (want|need|have) to (talk|speak) to {contact} {date}",
            "(start|make|set up) a call with {contact} in {place}",
            "(call|phone) {restaurant} (for|from) me",
        ),
        ("dial {contact} from the {room}", "put me through to {contact}"),
        ("phone {restaurant} and ask for {contact}", "let me speak with {contact} for {duration}"),
    ),
    "translate": (
        (
            "how (do you|do i|would you) say {phrase} in {language}",
            "(translate|change|put) {phrase} (into|to) {language}",
            "(say|write|read) {phrase} in {language}",
            "(tell me|give me|what is) the {language} for {phrase}",
            "what (is|would be|does it mean) {phrase} in {language}",
            "i (want|have) to say {phrase} to a {language} (friend|waiter|doctor)",
        ),
        ("what do {language} people say for {phrase}", "give me {phrase} in {language}"),
        ("turn {phrase} into {language}", "which words do i use for {phrase} in {language}"),
    ),
}

PREFIXES: tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]] = (
    (
        "(please|could you|could you please|hey|okay now|can you|hello|now)",
        "(when you get a chance|before i forget|if it is no trouble)",
        "{-contact} (wants you to|says you should|asks you to)",
        "i am (back from|still in) {-place} so",
        "it is {-time} already so",
        "i know it is {-date} but",
    ),
    ("um could you", "{-contact} is here so"),
    ("would you mind and", "as it is {-date}"),
)
SUFFIXES: tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]] = (
    (
        "(please|thanks|thank you|if you can|right away)",
        "(and be quick|and skip the rest|and that is all)",
        "(like|as) {-contact} (said|asked|wanted)",
        "(just like|as) on {-date}",
        "because {-contact} asked (me|you)",
    ),
    ("would you", "as we did in {-place}"),
    ("cheers", "because {-contact} told me to"),
)

Row = dict[str, Any]
Fillers = dict[str, list[str]]


def generate(*, seed: int = 0, train: int = 3000, dev: int = 500, test: int = 500) -> dict[str, list[Row]]:
    """Makes the three splits.

    The intents take turns, and so do the wordings of an intent, so that from 120 rows on a split holds
    every intent and every slot. No two rows of the result have the same words.

    Args:
        seed: decides which filler belongs to which split, and every draw.
        train: number of rows of the split ``train``.
        dev: number of rows of the split ``dev``.
        test: number of rows of the split ``test``.

    Returns:
        For each split its rows ``{"tokens": [...], "tags": [...], "intent": ...}``: lower-case words,
        one IOB2 tag a word.

    Raises:
        PipelineError: more rows are asked for than the grammar has different sentences of an intent.

    >>> row = generate(seed=1, train=1, dev=0, test=0)["train"][0]
    >>> len(row["tokens"]) == len(row["tags"]), row["intent"] in WORDINGS
    (True, True)
    """
    fillers = partition(seed)
    sizes = dict(zip(SPLITS, (train, dev, test), strict=True))
    return {split: _rows(split, n, fillers[split], seed) for split, n in sizes.items()}


def partition(seed: int) -> dict[str, Fillers]:
    """The fillers of every slot in each split; a filler is in one split only, whatever the slot."""
    draw = random.Random(f"fillers {seed}")
    pools: dict[str, dict[str, list[str]]] = {split: {} for split in SPLITS}
    for name, pool in POOLS.items():
        shuffled = draw.sample(pool, len(pool))
        n_held_out = max(2, round(HELD_OUT_FRAC * len(pool)))
        pools["dev"][name] = shuffled[:n_held_out]
        pools["test"][name] = shuffled[n_held_out : 2 * n_held_out]
        pools["train"][name] = shuffled[2 * n_held_out :]
    return {
        split: {slot: [f for name in names for f in own[name]] for slot, names in SLOTS.items()}
        for split, own in pools.items()
    }


def _rows(split: str, n_rows: int, fillers: Fillers, seed: int) -> list[Row]:
    draw = random.Random(f"{split} {seed}")
    known: set[str] = set()
    rows = []
    for k in range(n_rows):
        intent = list(WORDINGS)[k % len(WORDINGS)]
        for _ in range(200):
            row = _row(intent, k // len(WORDINGS), split, fillers, draw)
            text = " ".join(row["tokens"])
            if text not in known:
                break
        else:
            raise PipelineError(
                f"{n_rows} rows asked for split {split!r}, only {k} different ones found: ask for fewer"
            )
        known.add(text)
        rows.append(row)
    draw.shuffle(rows)
    return rows


def _row(intent: str, turn: int, split: str, fillers: Fillers, draw: random.Random) -> Row:
    held_out = SPLITS.index(split)
    n_new = (turn + 1) // NEW_WORDING_EVERY if held_out else 0
    if held_out and (turn + 1) % NEW_WORDING_EVERY == 0:
        choices, place = WORDINGS[intent][held_out], n_new - 1
    else:
        choices, place = WORDINGS[intent][0], turn - n_new
    prefix = draw.choice(_around(PREFIXES, held_out)) if draw.random() < PREFIX_FRAC else ""
    suffix = draw.choice(_around(SUFFIXES, held_out)) if draw.random() < SUFFIX_FRAC else ""
    sentence = _resolve(f"{prefix} {choices[place % len(choices)]} {suffix}", draw)
    tokens: list[str] = []
    tags: list[str] = []
    for part in sentence.split():
        if not part.startswith("{"):
            tokens.append(part)
            tags.append("O")
            continue
        slot = part.strip("{-}")
        words = draw.choice(fillers[slot]).split()
        tokens += words
        tags += ["O"] * len(words) if part[1] == "-" else [f"B-{slot}"] + [f"I-{slot}"] * (len(words) - 1)
    return {"tokens": tokens, "tags": tags, "intent": intent}


def _around(phrases: Sequence[tuple[str, ...]], held_out: int) -> tuple[str, ...]:
    return phrases[0] + phrases[held_out] if held_out else phrases[0]


def _resolve(sentence: str, draw: random.Random) -> str:
    """Puts one of its options in the place of every ``(a|b)``."""
    return re.sub(r"\(([^)]*)\)", lambda options: draw.choice(options[1].split("|")), sentence)
