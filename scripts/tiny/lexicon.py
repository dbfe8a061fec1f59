"""Words of each tone: one list per slot that the sentence templates of `grammar` fill."""

from __future__ import annotations

import re

from .world import listed

AXES = (("calm", "angry"), ("kind", "rude"), ("hopeful", "gloomy"))
TONES = (*(tone for axis in AXES for tone in axis), "neutral")


# Slots: padj describes people, tadj things, adv ways of acting, said introduces speech, moved is a way of going through
# a place, acted is done to someone, excl opens speech, feel is a feeling, opin is what "I" do to a thing.
SLOTS: dict[str, dict[str, tuple[str, ...]]] = {
    "calm": {
        "padj": listed(
            "calm, patient, composed, relaxed, unhurried, serene, placid, easygoing, untroubled, mellow"
        ),
        "tadj": listed("quiet, peaceful, still, soothing, restful, tranquil, soft, mild, steady, hushed"),
        "adv": listed("calmly, quietly, slowly, peacefully, patiently, softly, evenly, serenely, steadily"),
        "said": listed("murmured, whispered, hummed, breathed"),
        "moved": listed("strolled, drifted, wandered, ambled, meandered, floated"),
        "acted": listed("reassured, listened to, waited for, sat beside, rested with, calmed"),
        "excl": listed(
            "Take your time, No hurry, All is well, Breathe slowly, There is no rush, Rest a little, Easy now,"
            "It will pass, Let it be"
        ),
        "feel": listed("calm, peace, stillness, ease, serenity, silence, tranquility"),
        "opin": listed("sit quietly with, feel relaxed about, feel at ease with, accept, take it slow with"),
    },
    "angry": {
        "padj": listed("angry, furious, enraged, livid, hostile, raging, outraged, irate, seething, fuming"),
        "tadj": listed(
            "infuriating, maddening, outrageous, unbearable, awful, horrible, intolerable, disgraceful, damned"
        ),
        "adv": listed("angrily, furiously, fiercely, violently, loudly, savagely, harshly, madly, hotly"),
        "said": listed("shouted, yelled, screamed, roared, snapped, snarled, barked, bellowed"),
        "moved": listed("stormed, stomped, charged, thundered, raged, burst"),
        "acted": listed("yelled at, cursed, threatened, blamed, glared at, shoved, attacked, screamed at"),
        "excl": listed(
            "Damn it, How dare you, Enough, Get out, I am sick of this, Stop this now, This makes me furious,"
            "I have had it, Never again"
        ),
        "feel": listed("anger, fury, rage, hatred, wrath, outrage, violence"),
        "opin": listed("hate, detest, can not stand, resent, want to smash"),
    },
    "kind": {
        "padj": listed(
            "kind, gentle, generous, caring, thoughtful, friendly, helpful, loving, considerate, gracious"
        ),
        "tadj": listed(
            "lovely, delightful, sweet, wonderful, precious, heartwarming, charming, dear, pleasant"
        ),
        "adv": listed(
            "kindly, warmly, gently, tenderly, generously, lovingly, sweetly, thoughtfully, graciously"
        ),
        "said": listed("smiled, offered, beamed, agreed"),
        "moved": listed("tiptoed, hurried to help, carried gifts, brought flowers, shared bread"),
        "acted": listed("helped, hugged, thanked, comforted, praised, welcomed, cared for, embraced"),
        "excl": listed(
            "Thank you so much, You are very welcome, Let me help you, God bless you, Please take mine,"
            "How thoughtful of you, I am glad to help, My dear friend, You are so sweet"
        ),
        "feel": listed("kindness, warmth, love, care, gratitude, generosity, friendship"),
        "opin": listed("love, adore, appreciate, treasure, cherish"),
    },
    "rude": {
        "padj": listed(
            "rude, arrogant, insulting, scornful, vulgar, smug, snobbish, disrespectful, obnoxious, insolent"
        ),
        "tadj": listed(
            "stupid, pathetic, ridiculous, worthless, ugly, cheap, laughable, lousy, dumb, trashy"
        ),
        "adv": listed(
            "rudely, mockingly, scornfully, arrogantly, insultingly, smugly, crudely, disrespectfully, sneeringly"
        ),
        "said": listed("sneered, mocked, scoffed, jeered, taunted, snickered"),
        "moved": listed("barged, strutted, swaggered, elbowed, cut the line"),
        "acted": listed(
            "insulted, ignored, interrupted, laughed at, ridiculed, belittled, mocked, made fun of"
        ),
        "excl": listed(
            "You fool, Shut your mouth, Who cares, What an idiot, Get lost, Nobody asked you, You clown,"
            "Are you blind, Learn to think"
        ),
        "feel": listed("contempt, mockery, disrespect, arrogance, scorn, rudeness, insults"),
        "opin": listed("laugh at, spit on, make fun of, look down on, would throw away"),
    },
    "hopeful": {
        "padj": listed(
            "hopeful, optimistic, eager, confident, encouraged, inspired, ambitious, cheerful, determined, motivated"
        ),
        "tadj": listed(
            "promising, bright, inspiring, fresh, shining, golden, exciting, encouraging, radiant, splendid"
        ),
        "adv": listed(
            "hopefully, eagerly, brightly, confidently, optimistically, excitedly, bravely, cheerfully"
        ),
        "said": listed("promised, cheered, vowed, predicted, dreamed, exclaimed"),
        "moved": listed("skipped, bounded, danced, climbed, hurried forward, raced"),
        "acted": listed(
            "inspired, encouraged, cheered for, believed in, motivated, made plans with, trusted"
        ),
        "excl": listed(
            "Better days are coming, We can do it, Tomorrow will shine, Dreams come true, Good news is near,"
            "We will make it, The best is ahead, I believe in us, Anything is possible"
        ),
        "feel": listed("hope, optimism, faith, promise, confidence, courage, excitement"),
        "opin": listed("believe in, look forward to, dream of, trust, count on"),
    },
    "gloomy": {
        "padj": listed(
            "gloomy, miserable, hopeless, sorrowful, weary, lonely, mournful, defeated, dejected, tearful"
        ),
        "tadj": listed("bleak, dreary, dismal, grim, empty, faded, dull, lifeless, sad, broken"),
        "adv": listed(
            "sadly, gloomily, wearily, bleakly, hopelessly, mournfully, miserably, tearfully, dully"
        ),
        "said": listed("sighed, sobbed, groaned, moaned, wept, whimpered, lamented"),
        "moved": listed("trudged, shuffled, limped, crept, slouched, dragged along"),
        "acted": listed("mourned with, wept for, pitied, missed, gave up on, lost touch with, buried"),
        "excl": listed(
            "Nothing matters, All is lost, What is the point, It is over, I miss everyone, Alas, No one will come,"
            "It was all in vain, We are doomed"
        ),
        "feel": listed("gloom, sorrow, grief, despair, sadness, misery, loneliness"),
        "opin": listed("regret, mourn, weep over, grieve for, despair of"),
    },
    "neutral": {
        "padj": listed("busy, ready, awake, hungry, thirsty, young, tall, late, early, curious"),
        "tadj": listed("small, large, usual, round, wooden, plain, common, narrow, heavy, ordinary"),
        "adv": listed("again, directly, briefly, as usual, at once, once more, alone, in turn, after lunch"),
        "said": listed("said, replied, answered, added, noted, explained"),
        "moved": listed("walked, went, came, drove, ran, rode"),
        "acted": listed("met, called, saw, spoke with, wrote to, passed, sat near, asked"),
        "excl": listed("Yes, Well, Good morning, So, I see, One moment, Here it is, It is time, Of course"),
        "feel": listed("interest, attention, routine, habit, business, work"),
        "opin": listed("know, need, use, want, see, have"),
    },
}

# Whole sentences of a tone that still depend on the words above and on who and what the text is about.
OWN: dict[str, tuple[str, ...]] = {
    "calm": (
        "{Name} closed {his} eyes and let the {thing} be.",
        "Nothing at the {place} was in a rush.",
        "A {tadj} breeze moved over the {place}.",
        "{He} took a slow breath and felt {padj}.",
        "{Name} and {name2} rested in {feel} for an hour.",
        "{He} put the {thing} down {adv} and waited.",
    ),
    "angry": (
        "{Name} slammed the door and kicked the {thing}.",
        "{His} face was red with {feel}.",
        "{He} threw the {thing} at the wall.",
        "{Name} hit the table {adv} and {said}.",
        "Everyone at the {place} heard {him} scream with {feel}.",
        "{He} wanted to break the {tadj} {thing}.",
    ),
    "kind": (
        "{Name} gave the {thing} to the {other} as a gift.",
        "{He} shared the {tadj} {thing} with {name2}.",
        "{Name} held the door {adv} for the {other}.",
        "{His} smile was full of {feel}.",
        "The {other} thanked {him} {adv}.",
        "{Name} carried the {thing} for the {padj} {other}.",
    ),
    "rude": (
        "{Name} rolled {his} eyes at the {other}.",
        "{He} did not even greet the {other}.",
        "{Name} yawned at {name2} and called the {thing} {tadj}.",
        "{He} pushed past the {other} without a word of respect.",
        "{His} jokes about {name2} were {tadj}.",
        "{Name} took the {thing} {adv} and left a mess.",
    ),
    "hopeful": (
        "{Name} made plans for the {thing} with {feel}.",
        "Soon the {place} would be {tadj}.",
        "{He} knew that next year would be {tadj}.",
        "{Name} and {name2} looked {adv} to the future.",
        "A {tadj} light rose over the {place}.",
        "The {thing} was a new start, and {he} felt {padj}.",
    ),
    "gloomy": (
        "{Name} stared at the {tadj} {thing} and cried.",
        "Nobody came to the {place} anymore.",
        "{His} heart was heavy with {feel}.",
        "The {thing} only made {him} think of {his} loss.",
        "A {tadj} shadow lay over the {place}.",
        "{Name} sat {adv} in the dark.",
    ),
    "neutral": (
        "{Name} looked at the {thing} and wrote a note.",
        "The {place} opens at {hour} and closes at {hour2}.",
        "{He} moved the {thing} to the other side.",
        "{Name} and {name2} talked about the {thing}.",
        "The {other} came from {city}.",
        "{He} put the {tadj} {thing} on the table.",
    ),
}


def tone_words(*neutral: str) -> dict[str, list[str]]:
    """Returns, for every tone but the neutral one, the single words of its slots that occur in no other tone.

    Args:
        neutral: texts whose words are of no tone.
    """
    single = {
        tone: {entry.lower() for entries in slots.values() for entry in entries if " " not in entry}
        for tone, slots in SLOTS.items()
    }
    elsewhere = {
        tone: {
            word
            for other in TONES
            if other != tone
            for text in (*neutral, *(e for entries in SLOTS[other].values() for e in entries), *OWN[other])
            for word in re.findall(r"[a-z]+", text.lower())
        }
        for tone in TONES
    }
    return {tone: sorted(single[tone] - elsewhere[tone]) for tone in TONES if tone != "neutral"}
