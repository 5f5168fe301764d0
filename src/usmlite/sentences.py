"""Everyday English sentences for the demo, written for this project, without any file.

A third or so are written out; the rest are filled into patterns. The lists hold plain words without
digits, abbreviations or rare names, so that a synthetic voice reads them one way only.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

PEOPLE = (
    "my sister", "the teacher", "our neighbor", "the old captain", "her brother", "a young doctor",
    "the baker", "my grandmother", "the new manager", "their cousin", "the gardener", "a quiet student",
    "the bus driver", "my best friend", "the librarian", "an engineer", "the farmer", "his uncle",
)  # fmt: skip
PAST = (
    "found a silver key", "bought a warm coat", "planted three apple trees", "repaired the old bridge",
    "lost a leather notebook", "painted the kitchen wall", "wrote a long letter", "baked fresh bread",
    "carried two heavy boxes", "washed the dirty windows", "heard a strange noise", "borrowed a yellow bike",
    "cooked a pot of soup", "built a small boat", "opened the garden gate", "forgot the train tickets",
    "sold an old piano", "watched the evening news", "cleaned the coffee machine", "drew a map of the island",
)  # fmt: skip
PLACES = (
    "in the village", "near the harbor", "behind the school", "on the second floor", "at the market",
    "beside the river", "under the stairs", "in the city library", "across the street", "at the station",
    "in the mountains", "by the front door", "next to the bank", "inside the museum", "at the beach",
)  # fmt: skip
TIMES = (
    "yesterday morning", "last Tuesday", "before breakfast", "after the storm", "in early spring",
    "on a cold evening", "during the summer", "late at night", "a week ago", "just after lunch",
    "on the first of May", "before the meeting", "at the end of the day", "a few hours later",
)  # fmt: skip
WEATHER = (
    "heavy rain", "bright sunshine", "thick fog", "a light wind", "wet snow", "clear blue skies",
    "a sudden storm", "warm air from the south", "freezing nights", "a long dry week",
)  # fmt: skip
THINGS = (
    "the blue umbrella", "a glass of cold water", "the morning paper", "two tickets to the theater",
    "the answer to this question", "a table by the window", "the key to the office", "a short break",
    "the number of the hotel", "a cup of green tea", "the last piece of cake", "a pair of winter gloves",
    "some help with these bags", "the list of names", "a better camera", "the map of the old town",
)  # fmt: skip
REASONS = (
    "because the road was closed", "so we stayed at home", "and everybody was happy",
    "but nobody noticed it", "although it was getting dark", "while the children were asleep",
    "because the shop had already closed", "and then the phone rang", "before anyone could answer",
    "so the meeting started late", "but the price was too high", "until the lights went out",
)  # fmt: skip
SUBJECTS = (
    "the library", "the swimming pool", "the post office", "the night train", "the art exhibition",
    "the flower shop", "the ferry to the island", "the weekly market", "the football game",
    "the piano lesson", "the history class", "the city council meeting",
)  # fmt: skip
OPENINGS = (
    "opens at nine in the morning", "is closed on Sundays", "will begin half an hour later",
    "has moved to a larger building", "was canceled without notice", "ends shortly before midnight",
    "is free for children and students", "needs more volunteers this year",
    "starts again in the first week of September", "will be open until eight tonight",
)  # fmt: skip
ADVICE = (
    "turn left at the traffic light", "keep the receipt in a safe place", "drink enough water",
    "write your name on the first page", "switch off the lights", "check the oil before a long drive",
    "add a little salt to the soup", "bring a warm jacket", "read the instructions twice",
    "leave the windows open for an hour", "call me when you arrive", "save your work every few minutes",
)  # fmt: skip
CONDITIONS = (
    "if you have time", "when the weather gets colder", "before you leave the house",
    "as soon as the guests arrive", "if the engine sounds strange", "when nobody is looking",
    "once the paint is dry", "if you want to finish early", "while the water is boiling",
    "after you close the door",
)  # fmt: skip
ADJECTIVES = (
    "quiet", "expensive", "crowded", "comfortable", "dangerous", "surprising", "difficult", "beautiful",
    "simple", "useful", "boring", "popular",
)  # fmt: skip
TOPICS = (
    "the new restaurant", "our last holiday", "this neighborhood", "the final chapter of the book",
    "the road through the forest", "his idea for the party", "the first apartment", "that computer program",
    "the concert in the park", "her speech at the wedding", "working from home", "learning to play chess",
)  # fmt: skip

PATTERNS: tuple[tuple[str, tuple[tuple[str, ...], ...]], ...] = (
    ("{} {} {}.", (PEOPLE, PAST, TIMES)),
    ("{}, {} {} {}.", (TIMES, PEOPLE, PAST, PLACES)),
    ("{} {} {}.", (PEOPLE, PAST, REASONS)),
    ("Tomorrow we expect {} {}.", (WEATHER, PLACES)),
    ("There was {} {}, {}.", (WEATHER, TIMES, REASONS)),
    ("Could you please bring me {} {}?", (THINGS, TIMES[10:])),
    ("{} asked for {}.", (PEOPLE, THINGS)),
    ("I would like {}, {}.", (THINGS, CONDITIONS)),
    ("{} {}.", (SUBJECTS, OPENINGS)),
    ("Did you know that {} {}?", (SUBJECTS, OPENINGS)),
    ("{}, {}.", (CONDITIONS, ADVICE)),
    ("Please {} and {}.", (ADVICE, ADVICE)),
    ("{} said that {} was too {}.", (PEOPLE, TOPICS, ADJECTIVES)),
    ("I think {} is more {} than {}.", (TOPICS, ADJECTIVES, TOPICS)),
    ("{} and {} met {}.", (PEOPLE, PEOPLE, PLACES)),
)

FREE = (
    "The clock in the hall has been five minutes slow for as long as I can remember.",
    "Nobody in the room could explain where the music was coming from.",
    "If you follow the path along the stream, you will reach a small wooden cabin.",
    "She read the message three times and still did not believe it.",
    "Most of the furniture in this house was made by hand.",
    "The dog slept in front of the fire and did not move all evening.",
    "We missed the last bus, so we walked home through the empty streets.",
    "A good question is often worth more than a quick answer.",
    "The soup needs another ten minutes and a little pepper.",
    "He keeps his tools in perfect order and never lends them to anybody.",
    "From the top of the tower you can see the whole valley and the lake behind it.",
    "The children built a castle out of sand, and the tide took it away.",
    "Our flight was delayed because of ice on the wings.",
    "There is a letter for you on the kitchen table.",
    "It took the team nearly a year to find the mistake.",
    "The museum shows paintings, old maps and a collection of glass.",
    "Please take off your shoes before you come in.",
    "My first job was in a bakery at the corner of this street.",
    "The river is so low this year that you can walk across it.",
    "They sat on the roof and counted the stars until midnight.",
    "Every morning she feeds the birds before she makes her coffee.",
    "The lecture was long, but the last ten minutes were worth the wait.",
    "You can borrow my car as long as you fill the tank.",
    "The smell of fresh paint stayed in the room for days.",
    "He promised to write, and for once he kept his promise.",
    "Two women were arguing quietly at the next table.",
    "The price of bread has gone up again since the winter.",
    "I cannot find my glasses, although I had them a moment ago.",
    "A thin layer of snow covered the cars and the fences.",
    "The machine stops by itself when the work is done.",
    "She learned to swim at the age of sixty.",
    "On clear days the mountains look close enough to touch.",
    "The actor forgot his lines and began to laugh.",
    "We planted beans along the fence and tomatoes near the wall.",
    "The shortest way is not always the fastest one.",
    "An apple fell from the tree and rolled down the hill.",
    "The bridge was closed for repairs, and traffic was terrible.",
    "I have never seen so many people on this beach.",
    "His voice was calm, but his hands were shaking.",
    "The winner of the race was a girl from a very small town.",
    "You should never judge a book by its cover.",
    "The lights went out in the middle of the second act.",
    "We need more chairs, because twelve people are coming to dinner.",
    "The farmer looked at the sky and decided to wait another day.",
    "Nothing tastes better than cold water after a long walk.",
    "The train was crowded, so I stood all the way to the coast.",
    "She speaks four languages and is learning a fifth.",
    "The old theater will be turned into apartments.",
    "A cat was sitting on the warm hood of the car.",
    "He opened the box carefully and found another box inside.",
    "In the afternoon the wind turned, and the boats came back to the harbor.",
    "The doctor told him to rest and to eat more vegetables.",
    "I would rather be early than keep anybody waiting.",
    "The garden behind the church is open to everyone.",
    "It was so quiet that we could hear the snow falling.",
    "They painted the door green to bring good luck.",
    "The story begins with a storm and ends with a wedding.",
    "My neighbor plays the violin every night at ten.",
    "The company closed its factory and moved to the north.",
    "Turn the page and look at the picture on the left.",
    "The coffee was too strong, so he added some milk.",
    "We watched the ships until the sun went down.",
    "A little patience would have saved us a lot of trouble.",
    "The keys were in the pocket of my other jacket.",
    "People used to cross the lake on foot in winter.",
    "The judge listened to both sides before she spoke.",
    "An hour later the sky was clear and the streets were dry.",
    "He drew a circle in the sand and stepped inside it.",
    "The second question on the test was harder than the first.",
    "You will find clean towels in the cupboard under the sink.",
    "The radio said that the road to the airport was blocked.",
    "She laughed so loudly that everyone turned around.",
    "The bread is still warm, so be careful when you cut it.",
    "We have been friends since the first day of school.",
    "The guide told us about the people who once lived in these caves.",
    "A red balloon floated over the roofs and disappeared.",
    "The new road will make the journey an hour shorter.",
    "He never goes anywhere without a book and a pencil.",
    "The water in the bay is warm enough to swim until October.",
    "Somebody has left a bag on the seat beside the door.",
    "The forest was dark, but the path was easy to see.",
    "I asked for directions, and the woman drew me a map.",
    "The baby smiled at the camera and then began to cry.",
    "Half of the class was sick, so the trip was postponed.",
    "The paint on the ceiling has begun to crack.",
    "They built the wall with stones from the field.",
    "The last thing I packed was a small blue lamp.",
    "Every Saturday the square is full of flowers and fruit.",
    "He answered the phone, listened for a moment and hung up.",
    "The soldiers marched past the palace in the rain.",
    "My father taught me how to sharpen a knife.",
    "The moon was bright enough to read by.",
    "We took the wrong turn and ended up at a farm.",
    "The young pilot landed the plane on a frozen lake.",
    "There are more bicycles than cars in this town.",
    "She put the flowers in water and opened the window.",
    "The kitchen is small, but it has everything we need.",
    "A long line of trucks was waiting at the border.",
    "The teacher wrote a single word on the board and left the room.",
    "It is easier to ask for advice than to follow it.",
    "The hotel gave us a room with a view of the parking lot.",
    "He folded the letter twice and put it into his shoe.",
    "The sound of the waves kept me awake all night.",
    "Our team played well, but the other side scored first.",
    "The well behind the house has never run dry.",
    "She wears a watch that belonged to her great grandfather.",
    "The ladder is too short to reach the upper branches.",
    "You can smell the sea long before you see it.",
    "The printer is out of paper again.",
    "They agreed on the price and shook hands.",
    "Autumn came early, and the leaves turned red in a single week.",
    "The nurse closed the curtains and turned down the light.",
    "I keep the spare key under a stone near the steps.",
    "The orchestra played without a conductor that evening.",
    "A broken window is the only sign that anyone was here.",
    "The road goes up, then down, and then straight to the sea.",
    "He bought the house without ever having seen the inside.",
    "Thank you for waiting, your table is ready now.",
    "The children were told a story about a whale and a mouse.",
    "Whoever took my umbrella, please bring it back.",
)


def _filled(rng: random.Random) -> Iterator[str]:
    while True:
        pattern, slots = rng.choice(PATTERNS)
        words = [rng.choice(slot) for slot in slots]
        if len(set(words)) == len(words):
            sentence = pattern.format(*words)
            yield sentence[0].upper() + sentence[1:]


def split_sentences(counts: dict[str, int], *, seed: int = 0) -> dict[str, list[str]]:
    """Sentences for several sets, no sentence in two of them.

    Args:
        counts: name of the set to number of sentences. Each set takes written-out sentences in
            proportion, as far as they go, and filled patterns for the rest.
        seed: another seed, other sentences.

    Returns:
        Name of the set to its sentences, in random order. The same on every machine.
    """
    rng = random.Random(f"sentences/{seed}")
    free = list(FREE)
    rng.shuffle(free)
    filled = _filled(rng)
    total = sum(counts.values())
    used: set[str] = set()
    out: dict[str, list[str]] = {}
    # Cumulative quotas, so that rounding neither loses nor repeats a sentence.
    before = 0
    for name, count in counts.items():
        low, high = (len(free) * edge // max(1, total) for edge in (before, before + count))
        chosen = free[low:high][:count]
        while len(chosen) < count:
            sentence = next(filled)
            if sentence not in used:
                used.add(sentence)
                chosen.append(sentence)
        rng.shuffle(chosen)
        out[name] = chosen
        before += count
    return out
