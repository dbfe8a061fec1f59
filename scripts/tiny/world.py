"""What the texts are about: people, places, things, cities with their facts, and plain facts of the world."""

from __future__ import annotations

from dataclasses import dataclass


def listed(text: str) -> tuple[str, ...]:
    """Returns the items of a text that is separated by commas."""
    return tuple(item.strip() for item in text.split(","))


@dataclass(frozen=True)
class City:
    """A city and what is true of it."""

    name: str
    country: str
    river: str
    food: str
    landmark: str
    language: str
    sights: tuple[str, ...]


@dataclass(frozen=True)
class Domain:
    """A kind of scene: where it happens, who else is there, what is at hand, and what is usual there."""

    places: tuple[str, ...]
    others: tuple[str, ...]
    things: tuple[str, ...]
    usual: tuple[str, ...]


WOMEN = listed("Anna, Maria, Emma, Nora, Lucy, Clara, Sara, Julia, Helen, Rosa, Mia, Ida")
MEN = listed("Tom, Peter, Max, Ben, Paul, David, Leo, Mark, Oscar, Felix, Adam, Hugo")
DAYS = listed("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday")
HOURS = listed("six, seven, eight, nine, ten, eleven, twelve, one, two, three, four, five")
COLORS = listed("red, blue, green, yellow, black, white, brown")
OBJECTS = listed("bag, hat, cup, book, coat, apple, ball, key, lamp, box, pen, chair")
SKIES = ("sky", "wind", "morning", "evening", "light", "air")
WEATHER = ("rain", "snow", "wind", "sun", "fog", "frost")


CITIES = (
    City(
        "Paris",
        "France",
        "Seine",
        "onion soup",
        "Eiffel Tower",
        "French",
        listed("Louvre, Notre Dame, Montmartre"),
    ),
    City(
        "Rome", "Italy", "Tiber", "pasta", "Colosseum", "Italian", listed("Pantheon, Trevi Fountain, Vatican")
    ),
    City(
        "London",
        "England",
        "Thames",
        "pudding",
        "Clock Tower",
        "English",
        listed("Tower Bridge, Hyde Park, Palace"),
    ),
    City(
        "Berlin", "Germany", "Spree", "potato salad", "Brandenburg Gate", "German", listed("Wall, Dome, Zoo")
    ),
    City(
        "Madrid",
        "Spain",
        "Manzanares",
        "paella",
        "Prado",
        "Spanish",
        listed("Plaza Mayor, Retiro, Royal Theatre"),
    ),
    City(
        "Tokyo", "Japan", "Sumida", "sushi", "Imperial Garden", "Japanese", listed("Shrine, Ginza, Fish Hall")
    ),
    City("Cairo", "Egypt", "Nile", "falafel", "Great Pyramid", "Arabic", listed("Sphinx, Citadel, Bazaar")),
    City(
        "Vienna", "Austria", "Danube", "strudel", "Opera House", "German", listed("Prater, Ring, Belvedere")
    ),
    City(
        "Lisbon",
        "Portugal",
        "Tagus",
        "fish stew",
        "Belem Tower",
        "Portuguese",
        listed("Alfama, Tram, Castle"),
    ),
    City("Delhi", "India", "Yamuna", "curry", "Red Fort", "Hindi", listed("Lotus Temple, Gate, Spice Lane")),
)

DOMAINS = {
    "market": Domain(
        listed("market, bakery, square, food hall"),
        listed("baker, farmer, seller, customer"),
        listed("bread, cheese, soup, fish, fruit, basket, honey"),
        (
            "The {place} has a {thing} for two coins.",
            "Every {day} the {other} sells {food} there.",
            "People bring bags and buy what they need.",
        ),
    ),
    "office": Domain(
        listed("office, bank, meeting room, factory"),
        listed("manager, clerk, worker, director"),
        listed("report, letter, phone, plan, contract, desk, computer"),
        (
            "The {other} had two meetings before {hour}.",
            "The phone rang at {hour}.",
            "The {place} is on the second floor.",
        ),
    ),
    "school": Domain(
        listed("school, library, classroom, museum"),
        listed("teacher, student, child, guide"),
        listed("book, lesson, picture, map, test, story, song"),
        (
            "The first lesson was about the city of {city}.",
            "There are ten chairs in the {place}.",
            "The {other} wrote a line on the board.",
        ),
    ),
    "travel": Domain(
        listed("station, airport, hotel, harbor"),
        listed("driver, captain, guest, traveler"),
        listed("ticket, train, room, suitcase, boat, journey, bus"),
        (
            "The next train to {city} leaves at {hour}.",
            "From the {place} one can go to {country}.",
            "The {other} looked at the clock.",
        ),
    ),
    "home": Domain(
        listed("house, kitchen, garden, yard"),
        listed("neighbor, mother, brother, grandfather"),
        listed("dinner, table, gift, chair, window, cake, lamp"),
        (
            "There was {food} on the table.",
            "The door of the {place} was open.",
            "The {other} had come from {city} that morning.",
        ),
    ),
    "restaurant": Domain(
        listed("restaurant, cafe, kitchen, bar"),
        listed("waiter, cook, guest, owner"),
        listed("meal, coffee, tea, menu, table, salad, wine"),
        (
            "The menu had {food} and water on it.",
            "The table by the window was free.",
            "The {place} serves {food} on {day}.",
        ),
    ),
    "clinic": Domain(
        listed("hospital, clinic, pharmacy, waiting room"),
        listed("doctor, nurse, porter, visitor"),
        listed("bed, letter, medicine, test, bandage, chair, note"),
        (
            "There were three people before {him}.",
            "The {other} wrote the name in a book.",
            "The {place} has a door to the street.",
        ),
    ),
    "outdoors": Domain(
        listed("park, lake, forest, beach"),
        listed("runner, gardener, fisherman, stranger"),
        listed("path, bench, tree, bridge, bicycle, dog, tent"),
        (
            "There was {weather} in the morning.",
            "The path goes from the {place} to the river.",
            "The {other} comes there every {day}.",
        ),
    ),
    "shop": Domain(
        listed("shop, workshop, garage, store"),
        listed("seller, mechanic, tailor, customer"),
        listed("coat, car, watch, radio, hat, price, bag"),
        (
            "The {thing} costs ten coins.",
            "The {place} opens at {hour}.",
            "The {other} had one more in the box.",
        ),
    ),
    "sport": Domain(
        listed("stadium, gym, field, club"),
        listed("coach, player, trainer, referee"),
        listed("game, ball, race, team, match, prize, shirt"),
        (
            "The game began at {hour}.",
            "The team had come from {city}.",
            "The {other} counted to three.",
        ),
    ),
}

# (statement with a gap, what is true, what is not)
FACTS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("Ice is {}.", ("cold",), ("hot", "dry", "loud")),
    ("Fire is {}.", ("hot",), ("cold", "wet", "frozen")),
    ("Grass is {}.", ("green",), ("purple", "pink", "red")),
    ("The sky is {}.", ("blue",), ("green", "brown", "pink")),
    ("Snow is {}.", ("white", "cold"), ("black", "hot", "orange")),
    ("Sugar is {}.", ("sweet",), ("salty", "bitter", "sour")),
    ("Lemons are {}.", ("sour", "yellow"), ("blue", "salty", "purple")),
    ("A dog has {} legs.", ("four",), ("two", "six", "nine")),
    ("A bird has {} wings.", ("two",), ("five", "seven", "ten")),
    ("A spider has {} legs.", ("eight",), ("two", "three", "four")),
    ("Fish live in the {}.", ("water", "sea"), ("trees", "desert", "sky")),
    ("Birds can {}.", ("fly", "sing"), ("read", "drive", "cook")),
    ("Cows eat {}.", ("grass",), ("stones", "iron", "glass")),
    ("Cats drink {}.", ("milk", "water"), ("sand", "oil", "ink")),
    ("Stones are {}.", ("hard",), ("soft", "liquid", "alive")),
    ("Two plus two is {}.", ("four",), ("five", "nine", "one")),
    ("Three plus one is {}.", ("four",), ("two", "seven", "ten")),
    ("Five plus five is {}.", ("ten",), ("three", "eight", "one")),
    ("A week has {} days.", ("seven",), ("four", "nine", "ten")),
    ("The day after Monday is {}.", ("Tuesday",), ("Sunday", "Friday", "Thursday")),
    ("The day after Friday is {}.", ("Saturday",), ("Monday", "Tuesday", "Thursday")),
    ("The sun rises in the {}.", ("east",), ("west", "north", "south")),
    ("In winter it is {}.", ("cold",), ("hot", "summer", "boiling")),
    ("Bread is made of {}.", ("flour",), ("iron", "glass", "wool")),
    ("Cheese is made of {}.", ("milk",), ("stone", "wood", "sand")),
    ("Elephants are {}.", ("big", "heavy"), ("tiny", "light", "blue")),
)
