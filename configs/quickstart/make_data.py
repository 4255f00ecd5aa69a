"""Writes the quickstart's task: short business messages, each answered by one JSON object with five fixed keys.

    python configs/quickstart/make_data.py

A message speaks of a meeting, an order, a delivery or an invoice; the answer names its kind, person, company, date (as
YYYY-MM-DD, however it was written) and amount (two decimals), null where the message has none. Texts are put together
from wordings below, with order numbers, times and quantities strewn in that must *not* end up in the answer. People and
companies of the held-out rows never occur in training: what is measured is reading, not memory.

Same seed, same files, byte for byte.
"""

import datetime
import json
import random
from pathlib import Path
from typing import Any

SEED = 20250314
TRAIN_ROWS, HELD_OUT_ROWS = 192, 64
SYSTEM = "Reply with kind, person, company, date and amount as JSON."
KEYS = ("kind", "person", "company", "date", "amount")

FIRST = [
    *("Maria", "Tomasz", "Aisha", "Daniel", "Ingrid", "Kwame", "Lucia", "Henrik", "Priya", "Oscar", "Mei", "Samuel"),
    *("Elif", "Jonas", "Fatima", "Victor", "Hanna", "Diego", "Noor", "Peter", "Yuki", "Claire", "Andrei", "Zainab"),
    *("Marco", "Freya", "Rahul", "Sofia", "Emeka", "Astrid", "Pablo", "Leila", "Martin", "Chloe", "Ivan", "Amara"),
]
LAST = [
    *("Lopez", "Nowak", "Rahman", "Fischer", "Berg", "Mensah", "Romano", "Olsen", "Sharma", "Wilde", "Chen", "Okafor"),
    *("Yilmaz", "Weber", "Haddad", "Petrov", "Lindqvist", "Morales", "Siddiqui", "Novak", "Tanaka", "Dubois", "Bello"),
    *("Rossi", "Jensen", "Gupta", "Costa", "Eze", "Holm", "Garcia", "Karimi", "Keller", "Volkov", "Diallo", "Braun"),
    *("Saleh", "Moreau", "Kowalski", "Hughes", "Ito", "Barbosa", "Andersen", "Kaya", "Murphy", "Vega", "Lang", "Park"),
]
COMPANIES = [
    *("Northwind", "Bluebird Foods", "Halden Steel", "Riverside Clinic", "Orchard Books", "Tern Logistics"),
    *("Castell Paper", "Lumen Optics", "Vesta Heating", "Copper Kettle", "Mistral Travel", "Alder & Sons"),
    *("Quayside Hotel", "Juniper Labs", "Atlas Movers", "Meadow Dairy", "Signal Printing", "Harbour Bank"),
    *("Silverline Tours", "Fable Toys", "Granite Works", "Lotus Pharmacy", "Beacon Energy", "Pine Street Bakery"),
    *("Corvus Security", "Willow Gardens", "Delta Freight", "Opal Jewellers", "Kestrel Air", "Amber Insurance"),
    *("Foxglove Florists", "Summit Sports"),
]
ITEMS = [
    *("office chairs", "coffee beans", "printer paper", "LED lamps", "garden tools", "winter jackets", "glass jars"),
    *("steel bolts", "desk lamps", "notebooks", "ceramic tiles", "water filters", "bread crates", "camera lenses"),
    *("cables", "picture frames"),
]
ROOMS = [
    "room 204",
    "the main office",
    "the third floor",
    "hall B",
    "the canteen",
    "our Leeds office",
    "room 11",
    "the annex",
]

WORDINGS = {
    "meeting": [
        "{person} from {company} will meet us on {date} at {time} in {room}.",
        "Please note the meeting with {person} ({company}) on {date}. We start at {time}.",
        "Reminder: project review with {person} on {date}, {time}, {room}.",
        "I have booked {room} for {date}. {person} of {company} is coming to talk about the {item}.",
        "Can you join me and {person} on {date}? {company} wants to see the new {item}.",
        "The call with {person} has been moved to {date} at {time}.",
        "{company} invites you to a meeting on {date}. Your contact is {person}.",
        "Meeting, {date}, {person}.",
    ],
    "order": [
        "{person} ordered {count} {item} from {company} on {date} for {amount}.",
        "New order no. {number}: {count} {item}, total {amount}, placed on {date} by {person}, {company}.",
        "This is {person} at {company}. On {date} I would like to order {count} {item}. We agreed on {amount}.",
        "Thank you for your order of {date}, {person}! {count} {item} at {amount} in all.",
        "Order confirmation {number}. Customer: {person}. Company: {company}. Date: {date}. Total: {amount}.",
        "We received an order worth {amount} from {person} on {date}.",
        "Order by {person}, {date}: {amount}.",
        "Please enter this order: {item}, {amount}, dated {date}, for {person} of {company}.",
    ],
    "delivery": [
        "Your parcel {number} reaches {person} on {date}.",
        "{company} delivers {count} {item} to {person} on {date} at {time}.",
        "Delivery note: {count} {item}. Recipient: {person}. Arrival: {date}. Carrier: {company}.",
        "The {item} from {company} arrive on {date}; {person} will take them in at {room}.",
        "Dear {person}, your {item} are on their way and should be with you on {date}. Delivery costs {amount}.",
        "Driver of {company} expected on {date} around {time}. Ask for {person}.",
        "Shipment {number} for {person} leaves today and is due on {date}. Freight: {amount}, paid by {company}.",
        "Delivery to {person}, {date}.",
    ],
    "invoice": [
        "Invoice {number} from {company} over {amount} is due on {date}. Questions go to {person}.",
        "{person}, please pay {amount} to {company} by {date}.",
        "Attached is our invoice of {date} for {count} {item}: {amount}. Kind regards, {person}, {company}",
        "Invoice: {amount}, {date}, {person}.",
        "{company} has billed us {amount} for {item}. {person} must approve it before {date}.",
        "Bill no. {number}, {date}: {person} owes {amount}.",
        "The amount of {amount} was due on {date}. Please settle it soon. {person}, {company} accounts",
        "On {date} {company} sent an invoice for {amount}, addressed to {person}.",
    ],
}
OPENINGS = ["", "", "", "Hi all! ", "Hello. ", "Good morning. ", "FYI: ", "Dear team: ", "Quick note. "]
# Small talk of all lengths, so that rows differ in length too; none of it belongs in an answer.
ASIDES = [
    "Thanks!",
    "Reference {number}.",
    "Let me know if this suits you.",
    "Extension {count} can help with anything else.",
    "Parking is free behind the building, but please leave the spaces next to the door to visitors.",
    "The lift is being repaired this week, so come up the stairs on the left and ring twice.",
    "We have kept file {number} open in case you want to add something later.",
    "Last time there was some confusion about this, which is why I am writing it down for everybody.",
    "If you cannot open the attachment, try again after {time}; the server is slow in the morning.",
    "No need to reply unless something is wrong.",
]


def main(folder: Path) -> None:
    """Writes train.jsonl and heldout.jsonl into `folder`."""
    rng = random.Random(SEED)
    last, companies = [*LAST], [*COMPANIES]
    rng.shuffle(last)
    rng.shuffle(companies)
    train = make_rows(rng, TRAIN_ROWS, last=last[12:], companies=companies[8:])
    held_out = make_rows(rng, HELD_OUT_ROWS, last=last[:12], companies=companies[:8])
    for name, rows in (("train", train), ("heldout", held_out)):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def make_rows(rng: random.Random, count: int, *, last: list[str], companies: list[str]) -> list[dict[str, Any]]:
    """`count` conversations, kinds and wordings in equal shares, no text twice."""
    plans = [(kind, wording) for kind, wordings in WORDINGS.items() for wording in wordings]
    rows: dict[str, dict[str, Any]] = {}
    while len(rows) < count:
        kind, wording = plans[len(rows) % len(plans)]
        text, answer = make_pair(rng, kind, wording, last=last, companies=companies)
        rows[text] = {
            "messages": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": text},
                {"role": "assistant", "content": answer},
            ]
        }
    shuffled = list(rows.values())
    rng.shuffle(shuffled)
    return shuffled


def make_pair(rng: random.Random, kind: str, wording: str, *, last: list[str], companies: list[str]) -> tuple[str, str]:
    """One message and its answer."""
    asides = rng.sample(ASIDES, rng.choice([0, 0, 0, 0, 0, 0, 0, 1, 3, 5]))
    wording = " ".join([rng.choice(OPENINGS) + wording, *asides])
    day = datetime.date(2024, 1, 1) + datetime.timedelta(days=rng.randrange(3 * 365))
    cents = rng.choice([rng.randrange(10, 100) * 100, rng.randrange(1_000, 100_000), rng.randrange(1_000, 10_000) * 50])
    person, company = f"{rng.choice(FIRST)} {rng.choice(last)}", rng.choice(companies)
    text = wording.format(
        person=person,
        company=company,
        date=spell_date(rng, day),
        amount=spell_amount(rng, cents),
        item=rng.choice(ITEMS),
        room=rng.choice(ROOMS),
        time=f"{rng.randrange(8, 18)}:{rng.choice(['00', '15', '30', '45'])}",
        count=rng.randrange(2, 90),
        number=rng.randrange(10_000, 99_999),
    )
    answer = {
        "kind": kind,
        "person": person,
        "company": company if "{company}" in wording else None,
        "date": day.isoformat(),
    }
    # written out, since json would shorten 12.50 to 12.5: two decimals, always, are the simpler rule to learn
    amount = f"{cents / 100:.2f}" if "{amount}" in wording else "null"
    return text, f'{json.dumps(answer, ensure_ascii=False)[:-1]}, "amount": {amount}}}'


def spell_date(rng: random.Random, day: datetime.date) -> str:
    """A date as people write it."""
    forms = [
        f"{day.day} %B %Y",
        f"%B {day.day}, %Y",
        f"{day.day} %b %Y",
        "%Y-%m-%d",
        "%d.%m.%Y",
        f"%A, {day.day} %B %Y",
    ]
    return day.strftime(rng.choice(forms))


def spell_amount(rng: random.Random, cents: int) -> str:
    """A sum of money as people write it; whole ones sometimes without decimals."""
    number = f"{cents / 100:,.2f}"
    if cents % 100 == 0 and rng.random() < 0.5:
        number = number.removesuffix(".00")
    return rng.choice(["${}", "€{}", "£{}", "{} euros", "USD {}", "{} EUR"]).format(number)


if __name__ == "__main__":
    main(Path(__file__).parent)
