"""Sentences as people type them, put together from openings, what is meant, and endings.

Training needs many more ways to say thanks, or to ask where something is, than anybody lists by hand. Slots are those
of :mod:`fura_vlm.embedded.asking`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable

Parts = tuple[tuple[str, ...], ...]

SMALL_TALK: dict[str, Parts] = {
    "hello": (
        ("", "", "Oh, ", "Well, ", "So, "),
        (
            "hello", "hi", "hey", "hi there", "hello there", "hey there", "good morning", "good evening", "good day",
            "greetings", "hello my friend", "hi assistant", "hello assistant", "hi, are you there",
            "hello, is anybody there", "nice to see you", "good to see you", "nice to meet you", "glad to meet you",
        ),
        ("", ".", "!", " now.", ", good to see you.", ", I have a question.", ", let us begin.", ", here I am."),
    ),
    "thanks": (
        ("", "", "OK, ", "Great, ", "Oh, ", "Perfect, ", "Nice, ", "Good, ", "Ah, ", "Very good, ", "Fine, "),
        (
            "thanks", "thank you", "thank you very much", "many thanks", "thanks a lot", "thanks so much", "thx", "ty",
            "thank you so very much", "I thank you", "thanks again", "cheers", "much appreciated",
            "that was very useful, thanks", "that helped, thanks", "that is a help, thank you", "you were a great help",
            "thank you, you helped me", "this was helpful", "very kind of you",
        ),
        ("", ".", "!", " for your help.", " for the answer.", " for that.", " for telling me.", "!!",
         ", that is all.",
         ", I am happy.", ", you are kind.", " for everything!", ", now I know."),
    ),
    "bye": (
        ("", "", "OK, ", "Well, ", "So, ", "Good, ", "That was all, ", "Thanks, "),
        (
            "bye", "goodbye", "bye bye", "see you", "see you later", "see you soon", "see you tomorrow", "good night",
            "farewell", "take care", "until next time", "until later", "have a nice day", "have a good day",
            "I have to go", "I must leave", "I must go now", "I am going now", "time to go", "we are done", "so long",
        ),
        ("", ".", "!", " then.", " for today.", ", bye.", ", goodbye!", " and good night.", ", my friend.", " friend!"),
    ),
    "how_are_you": (
        ("", "", "Hi, ", "Hello, ", "So, ", "Hey, ", "Tell me, "),
        (
            "how are you", "how are you doing", "how are things", "how do you feel", "how is it going", "how is life",
            "how have you been", "are you well", "are you OK", "are you fine", "how is your day going", "what's up",
            "how do you do", "how was your day", "is everything well", "are you happy", "all good",
        ),
        ("?", "?", " today?", " now?", " there?", " this morning?", " my friend?", " these days?"),
    ),
    "who": (
        ("", "", "Hello, ", "Tell me, ", "So, ", "But ", "And ", "Hey, "),
        (
            "who are you", "what are you", "who am I talking to", "who is answering me", "who is this", "who is there",
            "are you a human", "are you a person", "are you a robot", "are you a machine", "are you a program",
            "are you real", "are you alive", "are you a bot", "are you a man or a woman", "are you somebody",
            "what is your name", "what's your name", "do you have a name", "what should I call you", "what is this",
            "are you an assistant", "what kind of thing are you", "what kind of machine are you", "who made you",
            "am I talking to a person", "am I talking to a machine", "is this a human", "is this a person",
        ),
        ("?", "?", " then?", " really?", " please?", " in fact?", ", my friend?"),
    ),
    "can_do": (
        ("", "", "Hello, ", "Tell me, ", "So, ", "Now, ", "Please, "),
        (
            "what can you do", "what can you tell me", "can you help me", "how can you help", "how can you help me",
            "what do you know", "what are you good at", "what are you for", "what can I ask you", "what should I ask",
            "which questions can you answer", "what kind of questions can I ask", "what do you do",
            "how do you work", "how does this work", "what is possible", "what can I do here", "what can I do with you",
            "what is your job", "what do you answer", "can you answer questions", "help", "I need help",
            "what would you like to be asked", "what can you say",
        ),
        ("?", "?", " for me?", " here?", " now?", " please?"),
    ),
    "praise": (
        ("", "", "Oh, ", "Yes, ", "Ah, ", "OK, ", "Wow, "),
        (
            "great", "good job", "well done", "very good", "nice", "that is right", "right", "correct", "perfect",
            "good answer", "you are right", "wonderful", "excellent", "cool", "I like that", "you did well",
            "interesting", "I see", "you are clever", "you are good at this", "amazing", "good work", "nice work",
        ),
        ("", ".", "!", " indeed.", ", really.", "!!"),
    ),
    "off_topic": (
        ("", "", "Tell me, ", "Now, ", "So, ", "One question: "),
        (
            "what time is it", "how is the weather", "what is the weather like", "who is the president",
            "what day is today", "where do you live", "how old are you", "can you cook", "can you dance",
            "can you sing", "what is the news", "are you hungry", "do you have a dog", "do you like music",
            "what is your favorite food", "what should I eat today", "who won the game", "where is my phone",
            "what is the meaning of life", "how far is the moon from here", "do you love me", "can you drive a car",
            "do you know a story", "do you know a joke", "can you write a poem", "when were you born",
            "how much is a house", "who wrote this book", "where am I",
        ),
        ("?", "?", "?", " now?", " please?"),
    ),
}  # fmt: skip


_ASKED = ("", "", "Please tell me ", "Can you say ", "I wonder ", "I would like to know ", "Say ", "Let me know ")
_PLEASE = ("", "", "Please ", "Can you ", "Could you ", "Would you ", "Now ", "I want you to ", "Try to ", "Do ")
_IF = (
    "", "Please tell me if ", "Can you say whether ", "I wonder if ", "I would like to know whether ", "Find out if ",
    "Say if ", "Let me know if ",
)  # fmt: skip
_END = ("?", "?", " please?", " now?", " exactly?", "")
MORE: dict[str, tuple[Parts, ...]] = {
    "describe": (
        (
            _PLEASE,
            ("describe", "explain", "tell me about", "talk about", "say something about", "write about", "go through"),
            (
                " it", " this", " the {picture}", " this {picture}", " all of it", " everything", " what you see",
                " what is there", " what is shown", " all that you see", " the scene", " the whole {picture}",
            ),
            (".", "", " for me.", " to me.", " please."),
        ),
        (
            (
                "What is", "What's", "What all is", "What do you find", "What can one see", "What can I see",
                "What can be seen", "What do you notice", "What have you got", "What did you see", "What do you see",
                "What is there", "What is visible", "What is drawn", "What was drawn", "So what is", "And what is",
                "What do I see", "What happens", "What can you find", "What should I see",
            ),
            (" here", " in it", " on it", " in the {picture}", " in this {picture}", " on this {picture}", " in there"),
            _END,
        ),
        (
            _PLEASE,
            ("tell me", "say", "explain", "list", "name", "report", "let me know", "write down"),
            (
                " what the {picture} has", " what there is", " what is here", " what one can see", " what you find",
                " what the {picture} holds", " what there is to see", " what things are here", " what this shows",
                " what was painted", " what all is in it", " what this {picture} has in it", " what you can see",
            ),
            (".", "", "?", " please."),
        ),
    ),
    "count": (
        (
            _ASKED,
            (
                "how many {things} there are", "how many {things} you see", "how many {things} are in the {picture}",
                "how many {things} are here", "how many {things} it has", "how many {things} there may be",
                "the number of {things}", "the count of {things}", "how many {things} one can see",
            ),
            ("", ".", "?", " please.", " in all."),
        ),
        (
            ("How many {things}", "What number of {things}"),
            (
                " are there", " are here", " do we have", " have you got", " are visible", " can be seen",
                " can you find", " did you see", " does it have", " are on the {picture}", " do I see", " were drawn",
            ),
            (*_END, " in all?", " altogether?"),
        ),
    ),
    "color": (
        (
            _ASKED,
            (
                "what color the {thing} is", "which color the {thing} has", "the color of the {thing}",
                "how the {thing} is colored", "in which color the {thing} is", "the color that the {thing} has",
                "the {thing}'s color", "what the color of the {thing} is",
            ),
            ("", ".", "?", " please."),
        ),
        (
            ("What color", "Which color", "What colour", "Which colour", "What sort of color"),
            (
                " is the {thing}", " has the {thing}", " does the {thing} have", " do you see on the {thing}",
                " is used for the {thing}", " did they give the {thing}", " would you call the {thing}",
                " shows the {thing}", " was the {thing} painted", " might the {thing} be",
            ),
            _END,
        ),
    ),
    "place": (
        (
            (*_ASKED, "Help me find out "),
            (
                "where the {thing} is", "where to find the {thing}", "where I can see the {thing}",
                "where the {thing} sits", "in which corner the {thing} is", "the place of the {thing}",
                "the position of the {thing}", "where exactly the {thing} is", "where to look for the {thing}",
                "the part of the {picture} with the {thing}", "the spot of the {thing}",
            ),
            ("", ".", "?", " please.", " in the {picture}."),
        ),
        (
            (
                "Where", "Where exactly", "Where about", "In what part", "In which corner", "On which side",
                "At what spot", "In which area", "Where in the {picture}", "At which place", "Where on it",
            ),
            (
                " is the {thing}", " do you see the {thing}", " can one see the {thing}", " does the {thing} lie",
                " sits the {thing}", " have you seen the {thing}", " should one look for the {thing}",
                " did you find the {thing}", " is the {thing} placed", " is the {thing} located", " stands the {thing}",
            ),
            _END,
        ),
    ),
    "presence": (
        (
            _IF,
            (
                "there is {a}", "you see {a}", "{a} is there", "{a} is in the {picture}", "it has {a}",
                "the {picture} has {a}", "one can see {a}", "{a} is somewhere", "I can see {a}",
            ),
            ("?", ".", "", " please."),
        ),
        (
            (
                "Is there", "Is there maybe", "Might there be", "Do you see", "Did you find", "Can you find",
                "Can one see", "Does it have", "Does it show", "Have we got", "Do we have", "Do I see",
                "Are you seeing",
            ),
            (" {a}",),
            ("?", " here?", " in it?", " in this {picture}?", " somewhere?", " in there?", " at all?", ""),
        ),
    ),
    "hello": (
        (
            ("", "Hello, ", "Hi, ", "Hey, ", "Oh, ", "Good day, "),
            (
                "you there", "good afternoon to you", "it is me again", "everybody", "everyone", "good to meet you",
                "here I am again", "I am back", "friend", "dear assistant", "how nice to see you", "let me ask you",
            ),
            ("", "!", ".", " again.", ", friend."),
        ),
    ),
    "thanks": (
        (
            ("", "OK, ", "Fine, ", "Good, ", "Great, ", "Well, "),
            ("thanks", "thank you", "many thanks", "thank you very much", "thanks a lot"),
            (
                ", that was all.", ", that is what I wanted to know.", ", that is all I need.", ", I have what I need.",
                ", that answers it.", ", no more questions.", ", I am done.", ", you helped me a lot.",
                ", this is enough.", ", it was nice of you.", ", I know enough now.", ", that is enough.", "!",
            ),
        ),
    ),
    "bye": (
        (
            ("", "OK, ", "Well, ", "Thanks, ", "Fine, "),
            (
                "bye", "goodbye", "see you", "good night", "farewell", "I am off", "I am done", "we are finished",
                "I will go", "until then", "see you around", "talk to you later", "I will be back", "until tomorrow",
            ),
            ("", "!", ".", " now.", " again.", ", take care.", ", have fun.", ", friend.", " soon.", ", bye."),
        ),
    ),
    "who": (
        (
            ("", "Hello, ", "Tell me, ", "So, ", "But ", "And "),
            (
                "who is it", "who speaks", "who is talking to me", "who writes these answers", "are you human",
                "are you some machine", "are you some program", "are you a thing or a person", "what exactly are you",
                "are you alive or a machine", "who or what are you", "are you a real person", "is somebody there",
                "say who you are", "tell me who you are", "tell me what you are", "introduce yourself",
            ),
            ("?", " then?", " please?", ".", ""),
        ),
    ),
    "can_do": (
        (
            ("", "Hello, ", "Tell me, ", "So, "),
            (
                "what are your skills", "are you able to help me", "are you able to see", "what are you made for",
                "what could you do for me", "what could you tell me", "what else can you do", "do you answer questions",
                "what things can you do", "what may I ask", "what do you help with", "with what can you help",
                "what can be asked", "what is your use",
            ),
            ("?", " here?", " then?", " for me?", ""),
        ),
    ),
}  # fmt: skip


def from_parts(parts: Parts, held_out: Iterable[str]) -> tuple[str, ...]:
    """Every sentence that takes one of each part, but none of ``held_out``, whatever its marks and capitals."""
    kept = {plain(sentence) for sentence in held_out}
    said = (sentence for sentence in map("".join, itertools.product(*parts)) if plain(sentence) not in kept)
    return tuple(dict.fromkeys(sentence[0].upper() + sentence[1:] for sentence in said))


def plain(sentence: str) -> str:
    """The sentence in small letters without marks."""
    return re.sub(r"[^a-z{} ]", "", sentence.lower()).strip()
