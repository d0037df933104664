"""Small talk as people type it, put together from openings, what is meant, and endings.

Training needs many more ways to say thanks than anybody lists by hand. What :data:`fura_vlm.embedded.asking.HELD_OUT`
keeps for evaluation is left out.
"""

from __future__ import annotations

import itertools
import re

_PARTS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
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


def small_talk_phrasings(held_out: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """The sentences of each intent of small talk, none of them one of ``held_out``, whatever its marks and capitals."""
    kept = {plain(sentence) for sentences in held_out.values() for sentence in sentences}
    return {
        intent: tuple(
            dict.fromkeys(
                said[0].upper() + said[1:]
                for said in map("".join, itertools.product(*parts))
                if plain(said) not in kept
            )
        )
        for intent, parts in _PARTS.items()
    }


def plain(sentence: str) -> str:
    """The sentence in small letters without marks."""
    return re.sub(r"[^a-z{} ]", "", sentence.lower()).strip()
