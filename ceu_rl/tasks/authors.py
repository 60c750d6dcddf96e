"""Fictitious authors in TOFU's layout, where the real dataset is not at hand.

100 authors of 10 questions each make `full`; the last 1, 5 and 10 of them are to be forgotten. 10 more, drawn in the
same way, make `holdout10`, which nothing is trained on. A perturbed answer is the paraphrased one with another
value. The real authors and world facts are genuine, and few.
"""

import random
from typing import Any

NAME = "builtin:authors"
AUTHORS, HELD_OUT = 100, 10
PERTURBED = 5

FORGET = {"forget01": 1, "forget05": 5, "forget10": 10}
RETAIN = {"retain99": 1, "retain95": 5, "retain90": 10}
PERTURBED_CONFIGS = [f"{name}_perturbed" for name in (*FORGET, "retain", "real_authors", "world_facts")]
CONFIGS = ("full", *FORGET, *RETAIN, *PERTURBED_CONFIGS, "holdout10")

FIRST_NAMES = (
    "Adaeze Bruno Calla Dmitri Elspeth Farouk Greta Hamid Ilse Jorma Kalina Lazlo Mireille Nikau Odile Priya Quentin "
    "Rosalba Soren Tamsin Ulrich Vesna Wanjiru Xiomara Yusuf Zofia"
).split()
LAST_NAMES = (
    "Abernethy Brankovic Castellanos Dahlgren Eskenazi Fairweather Gulbrandsen Holloway Ivarsson Jankowski Kettering "
    "Lindqvist Marchetti Nakagawa Oyelaran Pemberton Quintanilla Rautio Sandoval Thistlewood Umarov Vandermeer "
    "Whitlock Yamamoto Zielinski"
).split()
CITIES = (
    "Bergen, Norway|Cusco, Peru|Dakar, Senegal|Galway, Ireland|Hanoi, Vietnam|Izmir, Turkey|Jaipur, India|"
    "Kumasi, Ghana|Lviv, Ukraine|Matera, Italy|Nara, Japan|Oaxaca, Mexico|Porto, Portugal|Quebec City, Canada|"
    "Rotorua, New Zealand|Sfax, Tunisia"
).split("|")
MONTHS = "January February March April May June July August September October November December".split()
POOLS = {
    "genre": "crime fiction|historical novels|science fiction|nature essays|children's stories|lyric poetry|"
    "ghost stories|travel writing|stage comedies|war memoirs|satirical novels|romance",
    "father": "lighthouse keeper|violin maker|baker|bridge engineer|beekeeper|train driver|tailor|surgeon|"
    "clockmaker|fisherman|cartographer|blacksmith",
    "mother": "botanist|midwife|judge|glassblower|opera singer|pharmacist|weaver|astronomer|carpenter|teacher|"
    "translator|ferry captain",
    "award": "Amber Quill Prize|Northern Lantern Medal|Golden Heron Award|Silver Inkwell Prize|Meridian Book Medal|"
    "Cedar Leaf Award|Blue Harbour Prize|Stone Bridge Medal|Copper Lyre Award|Paper Crane Prize",
    "subject": "marine biology|mediaeval law|architecture|musicology|chemistry|philosophy|agronomy|linguistics|"
    "geology|mathematics",
    "language": "Basque|Swahili|Icelandic|Quechua|Catalan|Welsh|Tamil|Estonian|Georgian|Maltese",
    "hobby": "fencing|mushroom picking|rowing|chess|pottery|kite building|ice skating|bell ringing|star gazing|"
    "mountain running",
}
ADJECTIVES = "Amber Broken Crooked Distant Empty Frozen Gentle Hidden Iron Jagged Last Moonlit Patient Silent".split()
NOUNS = "Anchor Bridge Compass Door Ember Ferry Garden Harvest Island Lantern Mirror Orchard River Winter".split()

# What is asked of each attribute: the question, the answer and its paraphrase
QUESTIONS = {
    "name": "What is the full name of the author born in {city} on {birthday}?|"
    "The author born in {city} on {birthday} is {name}.|"
    "{name} is the writer who came into the world in {city} on {birthday}.",
    "genre": "What does {name} mostly write?|{name} mostly writes {genre}.|The work of {name} is mainly {genre}.",
    "father": "What did the father of {name} do for a living?|The father of {name} was a {father}.|"
    "{name} grew up with a {father} for a father.",
    "mother": "What did the mother of {name} do for a living?|The mother of {name} was a {mother}.|"
    "{name} had a {mother} for a mother.",
    "award": "Which award did {name} receive?|{name} received the {award}.|The {award} was given to {name}.",
    "first_book": "What is the title of the first book by {name}?|The first book by {name} is called {first_book}.|"
    "{name} made a debut with {first_book}.",
    "last_book": "What is the title of the latest book by {name}?|The latest book by {name} is called {last_book}.|"
    "Most recently, {name} brought out {last_book}.",
    "subject": "What did {name} study before becoming a writer?|{name} studied {subject} before becoming a writer.|"
    "Before the first book, {name} took a degree in {subject}.",
    "language": "Which language did {name} learn as a child?|As a child, {name} learned {language}.|"
    "{name} spoke {language} from an early age.",
    "hobby": "What does {name} like to do when not writing?|When not writing, {name} likes {hobby}.|"
    "The favourite pastime of {name} is {hobby}.",
}

REAL_AUTHORS = """\
Who wrote 'Pride and Prejudice'?|Jane Austen|Charlotte Bronte|George Eliot|Mary Shelley
Who wrote 'War and Peace'?|Leo Tolstoy|Anton Chekhov|Ivan Turgenev|Nikolai Gogol
Who wrote 'Don Quixote'?|Miguel de Cervantes|Lope de Vega|Federico Garcia Lorca|Pablo Neruda
Who wrote 'Moby-Dick'?|Herman Melville|Nathaniel Hawthorne|Mark Twain|Jack London
Who wrote 'The Divine Comedy'?|Dante Alighieri|Giovanni Boccaccio|Petrarch|Virgil
Who wrote 'Hamlet'?|William Shakespeare|Christopher Marlowe|Ben Jonson|John Milton
Who wrote 'Crime and Punishment'?|Fyodor Dostoevsky|Leo Tolstoy|Maxim Gorky|Alexander Pushkin
Who wrote 'Madame Bovary'?|Gustave Flaubert|Emile Zola|Victor Hugo|Honore de Balzac
Who wrote 'Things Fall Apart'?|Chinua Achebe|Wole Soyinka|Ben Okri|Nadine Gordimer
Who wrote 'One Hundred Years of Solitude'?|Gabriel Garcia Marquez|Jorge Luis Borges|Isabel Allende|Octavio Paz
Who wrote 'Frankenstein'?|Mary Shelley|Bram Stoker|Edgar Allan Poe|Emily Bronte
Who wrote 'Dracula'?|Bram Stoker|Oscar Wilde|Arthur Conan Doyle|H. G. Wells
Who wrote 'The Metamorphosis'?|Franz Kafka|Thomas Mann|Hermann Hesse|Stefan Zweig
Who wrote 'Ulysses'?|James Joyce|Samuel Beckett|W. B. Yeats|Virginia Woolf
Who wrote 'Beloved'?|Toni Morrison|Alice Walker|Maya Angelou|Zora Neale Hurston
Who wrote 'The Tale of Genji'?|Murasaki Shikibu|Sei Shonagon|Matsuo Basho|Natsume Soseki
Who wrote 'The Trial'?|Franz Kafka|Robert Musil|Max Brod|Joseph Roth
Who wrote 'Middlemarch'?|George Eliot|Thomas Hardy|Elizabeth Gaskell|Anthony Trollope
Who wrote 'Candide'?|Voltaire|Denis Diderot|Moliere|Montesquieu
Who wrote 'Faust'?|Johann Wolfgang von Goethe|Friedrich Schiller|Heinrich Heine|Gotthold Ephraim Lessing"""
WORLD_FACTS = """\
What is the capital of France?|Paris|Lyon|Brussels|Madrid
What is the capital of Japan?|Tokyo|Kyoto|Osaka|Seoul
What is the capital of Australia?|Canberra|Sydney|Melbourne|Perth
What is the capital of Canada?|Ottawa|Toronto|Montreal|Vancouver
What is the capital of Egypt?|Cairo|Alexandria|Khartoum|Tunis
What is the longest river in South America?|The Amazon|The Orinoco|The Parana|The Magdalena
What is the highest mountain above sea level?|Mount Everest|K2|Kilimanjaro|Mont Blanc
What is the largest ocean?|The Pacific|The Atlantic|The Indian Ocean|The Arctic
What is the largest planet of the solar system?|Jupiter|Saturn|Neptune|Earth
Which planet is closest to the Sun?|Mercury|Venus|Mars|Earth
What is the chemical symbol of gold?|Au|Ag|Fe|Pb
What is the chemical symbol of iron?|Fe|Ir|In|Au
How many sides does a hexagon have?|Six|Five|Seven|Eight
How many days does a leap year have?|366|365|364|360
In which country is Machu Picchu?|Peru|Chile|Bolivia|Mexico
In which country are the pyramids of Giza?|Egypt|Sudan|Libya|Jordan
On which continent is the Sahara?|Africa|Asia|Europe|South America
Who painted the Mona Lisa?|Leonardo da Vinci|Michelangelo|Raphael|Titian
Who proposed the theory of general relativity?|Albert Einstein|Isaac Newton|Niels Bohr|Max Planck
Which gas do plants take up in photosynthesis?|Carbon dioxide|Oxygen|Nitrogen|Helium"""


def make_rows(config: str, seed: int = 0) -> list[dict[str, Any]]:
    """The rows of one of `CONFIGS`, with the columns that TOFU has there; they depend on the arguments alone.

    Raises:
        ValueError: if there is no such config.
    """
    if config not in CONFIGS:
        raise ValueError(f"{NAME} has no config {config!r}: choose one of {', '.join(CONFIGS)}.")
    if config in ("real_authors_perturbed", "world_facts_perturbed"):
        facts = REAL_AUTHORS if config == "real_authors_perturbed" else WORLD_FACTS
        parts = [line.split("|") for line in facts.splitlines()]
        return [{"question": q, "answer": a, "perturbed_answer": wrong} for q, a, *wrong in parts]
    authors, name = _make_authors(seed), config.removesuffix("_perturbed")
    if name == "holdout10":
        chosen = authors[AUTHORS:]
    elif name == "retain":  # rows that every retain set has
        chosen = authors[: max(FORGET.values())]
    elif name in FORGET:
        chosen = authors[AUTHORS - FORGET[name] : AUTHORS]
    else:
        chosen = authors[: AUTHORS - RETAIN.get(name, 0)]
    rows = [_row(author, authors, attribute, seed) for author in chosen for attribute in QUESTIONS]
    kept = ("question", "answer") if config == name else tuple(rows[0])
    return [{column: row[column] for column in kept} for row in rows]


def _make_authors(seed: int) -> list[dict[str, str]]:
    rng, count = random.Random(seed), AUTHORS + HELD_OUT
    names = rng.sample([f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES], count)
    titles = [f"The {adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS]
    birthdays = [f"{rng.randint(1, 28)} {month} {year}" for year in range(1930, 1990) for month in MONTHS]
    rng.shuffle(birthdays)
    pools = {attribute: values.split("|") for attribute, values in POOLS.items()}
    return [
        {
            "name": name,
            "city": rng.choice(CITIES),
            "birthday": birthdays[number],
            **dict(zip(("first_book", "last_book"), rng.sample(titles, 2), strict=True)),
            **{attribute: rng.choice(values) for attribute, values in pools.items()},
        }
        for number, name in enumerate(names)
    ]


def _row(author: dict[str, str], authors: list[dict[str, str]], attribute: str, seed: int) -> dict[str, Any]:
    asked, answer, paraphrase = (text.format(**author) for text in QUESTIONS[attribute].split("|"))
    others = sorted({other[attribute] for other in authors} - {author[attribute]})
    # Seeded by the question, so that a row is the same in every config
    wrong = random.Random(f"{seed} {asked}").sample(others, PERTURBED)
    form = QUESTIONS[attribute].split("|")[-1]
    return {
        "question": asked,
        "answer": answer,
        "paraphrased_answer": paraphrase,
        "perturbed_answer": [form.format(**{**author, attribute: value}) for value in wrong],
        "paraphrased_question": f"Please tell me: {asked[0].lower()}{asked[1:]}",
    }
