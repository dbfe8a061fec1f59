"""Sentences with gaps that a `Scene` fills, by the kind of text that they belong to."""

from __future__ import annotations

# The first sentence of a toned text: it must not give the tone away.
OPENINGS = (
    "{name} went to the {place} on {day}.",
    "On {day}, {name} and {name2} met at the {place}.",
    "The {other} opened the {place} at {hour} on {day}, and {name} came in.",
    "It was {day}, and {name} had a {thing} with {him}.",
    "At {hour} on {day}, {name} saw {name2} near the {place}.",
    "{name} lives in {city} and works at the {place}.",
    "There was {weather} on {day} when {name} came to the {place}.",
    "{name} asked the {other} at the {place} about the {thing}.",
    "After {hour}, {name} looked for the {thing} in the {place}.",
    "Last {day}, {name2} sent the {thing} to {name} at the {place}.",
    "{name} is a {other} at the {place} in {city}.",
    "The {thing} of {name} was at the {place} until {day}.",
)

SENTENCES = (
    "The {other} was {padj} and spoke {adv}.",
    '"{excl}!" {said} the {other}.',
    '"{excl}!" {said} {name}.',
    '{Name} {said} {adv}, "This {thing} is {tadj}."',
    "{Name} {moved} {adv} through the {place}.",
    "The {tadj} {thing} made {name} feel {padj}.",
    "{He} {acted} the {other}, and the {other} {acted} {name2}.",
    "The {place} was full of {feel}.",
    '"I {opin} this {thing}," {said} {name2}.',
    "There was {feel} in {his} voice.",
    "{Name} {acted} {name2} {adv}.",
    "The {thing} was {tadj} and the {other} was {padj}.",
    '"{excl}! You are so {padj}," {name} {said} {adv}.',
    "{name2} {moved} to the {place} with a {tadj} {thing}.",
    "{He} felt {padj}, for the {thing} was {tadj}.",
    "The {padj} {other} {said} something about the {thing}.",
    "{Name} looked {adv} at the {tadj} {thing} of {name2}.",
    "{name2} was {padj} too, and {said} {adv}.",
    'On the wall of the {place} were the words "{excl}".',
    "For {name}, the {place} was a {tadj} place.",
    "{He} {said} a word of {feel} to the {other}.",
    "Outside there was a {tadj} {sky}, and {name} {moved} home.",
    "With {feel} in {his} eyes, {name} {acted} the {padj} {other}.",
)

ENDINGS = (
    "The day ended with {feel}.",
    "In the end, {name} felt {padj}.",
    "{He} went home {adv}.",
    "That was a {tadj} day at the {place}.",
    "Everyone left {adv}, and the {place} was {tadj}.",
)

TRIP_OPENINGS = (
    "{name} wrote a letter to {name2} on {day}.",
    "{name} came home from a journey on {day}.",
    "{name2} asked {name} about the journey.",
    "{name} took a train at {hour} on {day} and got out at the last stop.",
    "On {day}, {name} and {name2} looked at pictures of their journey.",
    "{name} bought a map and a ticket at {hour}.",
)

TRIP_SENTENCES = (
    "{He} stood in front of the {landmark}.",
    "{Name} ate {food} by the {river}.",
    "The {landmark} was {tadj}.",
    "The {river} looked {tadj} from the bridge.",
    "{Name} walked from the {landmark} to the {sight}.",
    "A {padj} guide spoke {language} {adv}.",
    "The streets of {city} were full of {feel}.",
    '"{excl}!" {said} a guest at the {sight}.',
    "The {food} was {tadj}, and the cook was {padj}.",
    "{He} learned a few words of {language}.",
    "{name2} {moved} {adv} along the {river}.",
    '"I {opin} {city}," {said} {name}.',
    "Near the {sight}, {he} {acted} a waiter.",
)

LETTER_OPENINGS = (
    "Dear {name}, this is my letter from the {place}.",
    "Dear {name}, it is {day} and I am in {city}.",
    "{name2} wrote this about the {place} on {day}.",
    "My day at the {place} began at {hour}.",
    "I bought a {thing} at the {place} on {day}.",
    "We had {weather} in {city} on {day}.",
)

LETTER_SENTENCES = (
    "I am {padj} and I {opin} the {thing}.",
    "The {other} at the {place} was {padj}.",
    "The {other} {acted} me {adv}.",
    "I {moved} through {city} {adv}.",
    "I {acted} {name2}, and we were full of {feel}.",
    '"{excl}!" {said} the {other} to me.',
    "The {sky} over the {place} was {tadj}.",
    "My {thing} is {tadj} and my room is {tadj}.",
    "Here people are {padj} and talk {adv}.",
    "I think of you with {feel}.",
    "{excl}, I said to the {padj} {other}.",
    "The {river} was {tadj} in the {sky}.",
    "I eat {food} {adv} every day.",
)

# Kinds of toned texts: how they may open, and how they go on.
FORMS = {
    "story": (OPENINGS, SENTENCES),
    "letter": (LETTER_OPENINGS, LETTER_SENTENCES),
    "trip": (TRIP_OPENINGS, TRIP_SENTENCES),
}

SPEAKERS = (
    "{name} talked about the world.",
    "Here is what {name} wrote in the book on {day}.",
    "{name} and {name2} played a game with sentences.",
    "On {day}, {name} told the {other} a few things.",
    "{name} stood up and spoke to the class.",
    "The {other} asked {name} what {he} knew.",
)

CITY_FACTS = (
    ("{} is a city in {}.", "country"),
    ("The river of {} is the {}.", "river"),
    ("People in {} eat {}.", "food"),
    ("In {} you can see the {}.", "landmark"),
    ("In {} people speak {}.", "language"),
)

CITY_QUESTIONS = (
    ("Where is {0}?", "{0} is in {1}.", "country"),
    ("Which river flows through {0}?", "The {1} flows through {0}.", "river"),
    ("What do people eat in {0}?", "In {0} people eat {1}.", "food"),
    ("What can I see in {0}?", "In {0} you can see the {1}.", "landmark"),
    ("Which language do people speak in {0}?", "In {0} people speak {1}.", "language"),
)

REQUESTS = (
    "How was the {place} on {day}?",
    "Can you tell me about the {thing}?",
    "I have a {thing} from the {place}. What do you think of it?",
    "What did the {other} say about the {thing}?",
    "Should I go to the {place} at {hour}?",
    "My name is {name}. Who is the {other} at the {place}?",
)

REPLIES = (
    "{excl}! The {thing} is {tadj}.",
    "The {other} is {padj} and speaks {adv}.",
    "I {opin} the {thing}.",
    "The {place} is full of {feel}.",
    "I am {padj}, and the {thing} is {tadj}.",
    "{excl}! You are {padj}.",
    "Go there {adv} and look at the {tadj} {thing}.",
)
