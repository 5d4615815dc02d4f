"""Words in two wordings, for paraphrase and graded similarity; each split has its own. No torch.

``left/right`` are two words for one meaning. One sentence of a pair uses the left word, the other the right one, so
that two sentences share no more words when they agree than when they differ.
"""

from __future__ import annotations

from dataclasses import dataclass

from autolora.tasks.mini.lexicon import pairs

Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Synonyms:
    """The synonym pairs of one split.

    Attributes:
        people: nouns for a person.
        acts: what one person does to another (transitive verbs).
        things: countable things.
        handlings: what a person does with a thing (transitive verbs).
        places: countable places, without the preposition.
        traits: adjectives for a person.
        looks: adjectives for a thing.
        converses: verbs of transfer "A verb thing to B" and the other party's "B verb thing from A".
        amounts: numbers in words and in figures.
    """

    people: Pairs
    acts: Pairs
    things: Pairs
    handlings: Pairs
    places: Pairs
    traits: Pairs
    looks: Pairs
    converses: Pairs
    amounts: Pairs


_TRAIN = Synonyms(
    people=pairs(
        "doctor/physician lawyer/attorney teacher/instructor kid/child soldier/trooper student/pupil boss/employer "
        "robber/bandit baby/infant cop/police_officer king/monarch worker/laborer singer/vocalist buddy/friend "
        "clown/jester scientist/researcher painter/artist athlete/sportsman manager/supervisor secretary/clerk "
        "client/customer foreigner/alien enemy/foe nanny/babysitter inventor/creator barber/hairdresser"
    ),
    acts=pairs(
        "praise/commend criticize/denounce hire/employ help/assist hate/detest attack/assault deceive/trick "
        "answer/reply_to murder/kill annoy/irritate frighten/scare meet/encounter choose/select teach/educate "
        "follow/pursue injure/hurt observe/watch"
    ),
    things=pairs(
        "car/automobile couch/sofa picture/photograph movie/film rock/stone gift/present bike/bicycle plane/aircraft "
        "rug/carpet jacket/coat jewel/gem rifle/gun cap/hat ship/vessel cup/mug "
        "curtain/drape pail/bucket garbage_can/trash_bin lamp/light "
        "bottle/flask mirror/looking_glass newspaper/journal engine/motor wallet/billfold"
    ),
    handlings=pairs(
        "repair/fix buy/purchase find/discover destroy/demolish clean/wash steal/swipe throw/toss hide/conceal "
        "sell/peddle sketch/draw grab/seize want/desire move/shift "
        "mail/post guard/protect"
    ),
    places=pairs(
        "shop/store street/road forest/woods cellar/basement school/academy hospital/clinic prison/jail "
        "harbor/port restaurant/diner garden/yard office/workplace"
    ),
    traits=pairs(
        "happy/glad angry/furious smart/intelligent brave/courageous lazy/idle rich/wealthy sick/ill tired/exhausted "
        "polite/courteous strange/odd famous/well-known quiet/silent"
    ),
    looks=pairs(
        "big/large small/little costly/expensive quick/fast broken/damaged beautiful/lovely old/aged filthy/dirty "
        "heavy/weighty dull/boring"
    ),
    converses=pairs("sell/buy lend/borrow give/get rent/lease"),
    amounts=pairs("two/2 four/4 six/6 eight/8 ten/10 twelve/12 fifteen/15 thirty/30"),
)

_DEV = Synonyms(
    people=pairs(
        "author/writer spouse/partner thief/burglar professor/lecturer reporter/journalist guest/visitor "
        "sailor/seaman farmer/grower actor/performer chef/cook lady/woman priest/clergyman"
    ),
    acts=pairs("rescue/save fire/dismiss kiss/smooch love/adore defeat/beat warn/alert insult/offend mock/ridicule"),
    things=pairs(
        "house/home television/TV cab/taxi bag/sack computer/PC sweater/pullover fridge/refrigerator phone/telephone "
        "pistol/handgun cookie/biscuit truck/lorry"
    ),
    handlings=pairs("examine/inspect collect/gather smash/shatter paint/decorate lose/misplace lift/raise burn/scorch"),
    places=pairs("airport/airfield hotel/inn church/chapel market/bazaar mall/shopping_center theater/playhouse"),
    traits=pairs("sad/sorrowful fearful/afraid funny/humorous honest/truthful stubborn/obstinate poor/penniless"),
    looks=pairs("tiny/minute empty/vacant shiny/glossy ugly/hideous ancient/age-old strong/sturdy"),
    converses=pairs("send/receive hand_over/accept"),
    amounts=pairs("three/3 five/5 seven/7 nine/9 twenty/20"),
)

SYNONYMS: dict[str, Synonyms] = {"train": _TRAIN, "dev": _DEV}
