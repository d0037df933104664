"""Everyday words: what people name, do and say besides the shapes of the embedded world.

Pretraining text is made of them, so that the tokenizer holds them whole and the model has seen them. The embedded
pictures show none of the things named here.
"""

# Things that no embedded picture shows. Conversations ask for some; those kept for evaluation are HELD_OUT_THINGS.
THINGS = tuple(
    "animal apple arm arrow baby bag ball banana bed bench bicycle bike bottle bowl box boy bread bridge brush bucket "
    "building bus butterfly button camera candle car carrot castle cat chair cheese chicken child church clock coin "
    "computer cow cup curtain dinosaur dog doll dragon dress egg engine eye face fence finger flag floor foot fork "
    "fox frog fruit garden girl glass grass guitar hammer hand hat horse house human kite kitten knife ladder lady "
    "leaf letter man map mirror monkey mountain mouse nose orange owl pan paper pen pencil person phone pig pillow "
    "plane plant plate puppy rabbit ring river rocket roof room rope rose shark sheep shirt shoe sky snake snowman "
    "sock sofa spider spoon stone street table tail teacher teapot tent tiger tower toy train truck wall watch wheel "
    "wing window woman zebra".split()
)
HELD_OUT_THINGS = tuple("airplane bear bird elephant flower giraffe key lamp lion moose umbrella whale".split())
LOOKS = tuple(
    "bad beautiful bright clean clear cold cute dark deep dry easy empty fast full funny good happy hard heavy high "
    "hot interesting kind light little long loud low narrow new nice old poor quick quiet rich round sad sharp short "
    "simple slow soft strange strong sweet tall thick thin tired ugly warm weak wet wide wise wrong young".split()
)
DOES = tuple(
    "asks believes breaks brings builds buys calls carries catches checks chooses closes cooks counts cuts describes "
    "draws drives eats explains feels finds fixes follows forgets gets gives guesses hears helps hides holds imagines "
    "keeps knows learns leaves likes looks loses loves makes meets moves names needs notices opens paints pays picks "
    "plays points pulls pushes puts reads remembers says sees sells sends shows sings sits sleeps speaks stands starts "
    "stops takes talks teaches tells thinks throws touches tries turns understands uses waits walks wants washes "
    "watches wears wins wonders works writes".split()
)
PEOPLE = tuple(
    "Anna Ben Carla David Eva Frank Grace Henry Ida Jack Kate Leo Maria Nora Oscar Paul Rosa Sam Tom Vera".split()
)
# Colours and shapes that pictures of other worlds have.
OTHER_COLORS = tuple("brown gray grey white teal gold silver violet".split())
OTHER_SHAPES = tuple("rectangle oval line dot ring box hexagon pentagon arrow".split())
NUMBERS = tuple("zero one two three four five six seven eight nine ten eleven twelve".split())
SMALL_WORDS = tuple(
    "a about actually after again all almost alone along already also always an and another any anything are as at "
    "away back be because been before behind below beside best better between big bit both but by came can cannot "
    "certainly come could day did different do does doing done down each either else end enough even ever every "
    "everything exactly far few first for from front get go going got great had half has have having he hear hello "
    "help her here hers hey hi him his how i if in instead into is it its itself just kind know large last later least "
    "left less let like likely listen look lot made make many may maybe me mean might mine minute moment more morning "
    "most much must my myself near need never next night no nobody none nor not nothing now number of off often oh ok "
    "okay on once one only onto open or other others our out over own part per perhaps please pretty probably quite "
    "rather ready real really right same say second see seem shall she should side since size small so some somebody "
    "someone something sometimes soon sorry still such sure tell than thank thanks that the their them then there "
    "these they thing this those though through time to today together tomorrow too top toward true try turn twice "
    "under until up upon us use usually very want was way we well were what when where whether which while who whole "
    "whose why will with within without wonder would yes yesterday yet you your yours yourself".split()
)
TALK = (
    "Hello!", "Hi there!", "Good morning!", "Good evening!", "Good afternoon!", "Welcome back!", "Nice to meet you.",
    "How are you?", "How are you doing today?", "I am fine.", "I am fine, thank you.", "Thank you!", "Thanks a lot!",
    "You are welcome.", "Goodbye!", "Bye!", "See you later!", "See you soon.", "Have a nice day!", "Good night!",
    "Well done!", "Great!", "Very good.", "Good job!", "Nice.", "That is right.", "That is wrong.", "Are you sure?",
    "Sorry.", "No problem.", "Who are you?", "What is your name?", "What can you do?", "Can you help me?",
    "I can help you.", "I am glad to help.", "Of course.", "Ask me about the picture.", "I do not know.",
    "I only know about pictures.", "I look at pictures and answer questions.", "I am an assistant.",
    "Tell me a joke.", "What time is it?", "How is the weather?", "Let us talk.", "Let us begin.", "One more question.",
    "I have a question.", "That was all.", "I see.", "I understand.", "Anything else?", "Nice talking to you.",
    "You did that very well.", "Much appreciated.", "Cheers!", "What a lovely day!", "What's up?",
    "Hey, how is it going?",
)  # fmt: skip
EVERYDAY = (*THINGS, *HELD_OUT_THINGS, *LOOKS, *DOES, *OTHER_COLORS, *OTHER_SHAPES, *NUMBERS, *SMALL_WORDS)
