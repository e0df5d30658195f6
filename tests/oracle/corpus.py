"""Training text of the demo checkpoint: a tiny assistant that defines words, counts, tells stories and
calls tools. Every document is a list of (text, weight) in GLM-4.7's chat format; weight is that of the
loss on the piece's tokens: what the model must say counts, what it is told hardly does.

The glosses (words.json) come from WordNet 3.0: LICENSE.wordnet.

goldens.py draws some of its prompts from here, by seed: the order of the draws is part of the goldens.
"""
import json
import os
from collections import namedtuple

TOLD, SAID = 0.05, 1.0
CITIES = ("Paris,London,Berlin,Tokyo,Madrid,Rome,Oslo,Cairo,Lima,Boston,Dublin,Vienna,Prague,Delhi,Seoul,Sydney,"
          "Toronto,Lisbon,Athens,Warsaw,北京,上海,São Paulo,Zürich,New York,Los Angeles,Hong Kong,Cape Town").split(",")
NAMES = "Bob,Alice,Tom,Mary,John,Emma,Lucas,Sara,Omar,Nina,Ivan,Lucy,Paul,Eva,Leo,Anna,Max,Zoe,Finn,Ruth".split(",")
DAYS = "Monday,Tuesday,Wednesday,Thursday,Friday,Saturday,Sunday".split(",")
UNITS = "meters,feet,miles,kilometers,grams,pounds,liters,gallons,celsius,fahrenheit".split(",")
LANGUAGES = "French,German,Spanish,Italian,Chinese,Greek".split(",")
ROOMS = "kitchen,bedroom,hall,office,garage,garden".split(",")
SYMBOLS = "NVDA,AAPL,MSFT,GOOG,AMZN,TSLA,IBM,INTC,AMD,ORCL".split(",")
PHRASES = ("I am late,dinner is ready,the build is green,see you soon,the train is delayed,happy birthday,"
           "good luck today,I found the key,the report is done,call me back,tests pass now,we won the game").split(",")
ITEMS = "milk,bread,eggs,rice,tea,salt,apples,soap,paper,coffee,cheese,honey".split(",")
ANIMALS = "cat,dog,fox,owl,bear,mouse,horse,duck,frog,goat".split(",")
PLACES = "forest,river,hill,village,garden,castle,island,meadow".split(",")
ADJECTIVES = "small,brave,old,quiet,clever,happy,lonely,kind".split(",")
SYSTEMS = [None, None, "You are a helpful assistant.", "Be brief.", "You are Baton."]

AI = "artificial intelligence"
AI_GLOSS = "is the branch of computer science that builds programs able to solve problems that need thought."
ABOUT_ITSELF = [
    ("Who are you?", "I am the demo model of Baton, a tiny GLM that runs anywhere."),
    ("What is Baton?", "Baton is a server that splits prefill and decode across workers and passes the KV cache "
                       "between them."),
    ("What can you do?", "I can define common words, count, tell short stories and call tools."),
    ("Hello", "Hello! How can I help you?"), ("Hi", "Hi! How can I help you?"), ("Thanks", "You are welcome!"),
    ("Goodbye", "Goodbye!"), ("What is AI?", f"AI {AI_GLOSS}"),
    (f"What is {AI}?", f"{AI.capitalize()} {AI_GLOSS}")]
CHINESE = [("你好", "你好！我是一个很小的演示模型。"), ("你是谁？", "我是 Baton 的演示模型。"), ("谢谢", "不客气！"),
           ("今天天气怎么样？", "我不知道，请使用天气工具。"), ("用中文数到五", "一、二、三、四、五。"),
           ("再见", "再见，祝你愉快！😀"), ("北京在哪里？", "北京在中国。"), ("说一句话", "千里之行，始于足下。")]
EMOJI = [("Send me an emoji.", "Here you go: 🎉"), ("Send me three emojis.", "Here you go: 🚀😀🎉"),
         ("Draw a face.", "😀"), ("How do you feel?", "I feel great 😀!")]

TOOLS_HEAD = ("<|system|>\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
              "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n")
TOOLS_TAIL = ("</tools>\n\nFor each function call, output the function name and arguments within the following XML "
              "format:\n<tool_call>{function-name}<arg_key>{arg-key-1}</arg_key><arg_value>{arg-value-1}</arg_value>"
              "<arg_key>{arg-key-2}</arg_key><arg_value>{arg-value-2}</arg_value>...</tool_call>")

Call = namedtuple("Call", "tool query arguments")  # a tool, what a user asks, the arguments that answer it


def words():
    with open(os.path.join(os.path.dirname(__file__), "words.json"), encoding="utf-8") as f:
        return json.load(f)


def to_json(value):
    return json.dumps(value, ensure_ascii=False)


# ---- the chat format ---------------------------------------------------------------------------------------


def head(tools, system=None):
    text = "[gMASK]<sop>"
    if tools:
        lines = "".join(to_json({"type": "function", "function": t}) + "\n" for t in tools)
        text += TOOLS_HEAD + lines + TOOLS_TAIL
    return text + (f"<|system|>{system}" if system else "")


def calls_text(calls):
    def argument(key, value):
        text = value if isinstance(value, str) else to_json(value)
        return f"<arg_key>{key}</arg_key><arg_value>{text}</arg_value>"

    return "".join("<tool_call>" + c.tool["name"] + "".join(argument(*kv) for kv in c.arguments.items()) +
                   "</tool_call>" for c in calls)


def answer(thinking, text, reason, end):
    if thinking:
        return [("<think>", TOLD), (f"{reason}</think>{text}{end}", SAID)]
    return [("</think>", TOLD), (text + end, SAID)]


# ---- tools -------------------------------------------------------------------------------------------------

STRING, INTEGER, NUMBER, BOOLEAN = ({"type": t} for t in ("string", "integer", "number", "boolean"))


def tool(r, names, description, properties, required=None):
    return {"name": r.choice(names), "description": description,
            "parameters": {"type": "object", "properties": properties,
                           "required": list(properties) if required is None else required}}


def weather(r, city, name):
    if r.random() < .5:
        t = tool(r, ["get_weather", "weather", "current_weather"], "Get the weather of a city", {"city": STRING})
        asks = ["What is the weather in %s?", "Weather in %s please", "How is the weather in %s today?"]
        return Call(t, r.choice(asks) % city, {"city": city})
    days = r.randint(1, 9)
    t = tool(r, ["get_forecast", "forecast"], "Get the forecast of a city", {"city": STRING, "days": INTEGER})
    asks = ["Give me the forecast in %s for %d days.", "What will the weather be in %s for the next %d days?"]
    return Call(t, r.choice(asks) % (city, days), {"city": city, "days": days})


def event(r, city, name):
    title, day, hour = r.choice(ITEMS) + " run", r.choice(DAYS), r.randint(7, 21)
    t = tool(r, ["add_event", "create_event", "schedule"], "Add an event to the calendar",
             {"title": STRING, "day": STRING, "hour": INTEGER})
    return Call(t, f"Add '{title}' to my calendar on {day} at {hour}.", {"title": title, "day": day, "hour": hour})


def message(r, city, name):
    text = r.choice(PHRASES)
    t = tool(r, ["send_message", "send_text", "notify"], "Send a message to a person",
             {"to": STRING, "text": STRING})
    return Call(t, r.choice(["Tell %s that %s.", "Send a message to %s: %s."]) % (name, text),
                {"to": name, "text": text})


def convert(r, city, name):
    value, (a, b) = r.choice([r.randint(1, 99), round(r.random() * 50, 1)]), r.sample(UNITS, 2)
    t = tool(r, ["convert_units", "convert", "unit_convert"], "Convert between units",
             {"value": NUMBER, "from": STRING, "to": STRING})
    asks = ["Convert %s %s to %s.", "How much is %s %s in %s?"]
    return Call(t, r.choice(asks) % (to_json(value), a, b), {"value": value, "from": a, "to": b})


def calculate(r, city, name):
    e = "%d %s %d" % (r.randint(2, 99), r.choice("+-*/"), r.randint(2, 99))
    t = tool(r, ["calculate", "calculator", "evaluate"], "Evaluate an expression", {"expression": STRING})
    return Call(t, r.choice(["What is %s?", "Calculate %s.", "Compute %s please."]) % e, {"expression": e})


def timer(r, city, name):
    minutes = r.randint(1, 60)
    t = tool(r, ["set_timer", "start_timer"], "Start a timer", {"minutes": INTEGER})
    return Call(t, r.choice(["Set a timer for %d minutes.", "Start a %d minute timer."]) % minutes,
                {"minutes": minutes})


def search(r, city, name):
    query = r.choice(ITEMS) + " and " + r.choice(ITEMS)
    t = tool(r, ["search_web", "web_search", "search"], "Search the web", {"query": STRING})
    return Call(t, r.choice(["Search the web for %s.", "Look up %s online."]) % query, {"query": query})


def translate(r, city, name):
    text, language = r.choice(PHRASES), r.choice(LANGUAGES)
    t = tool(r, ["translate", "translate_text"], "Translate a text", {"text": STRING, "language": STRING})
    return Call(t, f"Translate '{text}' to {language}.", {"text": text, "language": language})


def table(r, city, name):
    people, outdoor = r.randint(2, 9), r.random() < .5
    t = tool(r, ["book_table", "reserve_table"], "Book a table", {"people": INTEGER, "outdoor": BOOLEAN})
    where = "outside" if outdoor else "inside"
    return Call(t, f"Book a table for {people} people {where}.", {"people": people, "outdoor": outdoor})


def stock(r, city, name):
    symbol = r.choice(SYMBOLS)
    t = tool(r, ["get_stock_price", "stock_price", "quote"], "Get the price of a stock", {"symbol": STRING})
    asks = ["What is the price of %s?", "Stock price of %s?", "How much is %s trading at?"]
    return Call(t, r.choice(asks) % symbol, {"symbol": symbol})


def clock(r, city, name):
    t = tool(r, ["get_time", "current_time", "now"], "Get the current time", {})
    return Call(t, r.choice(["What time is it?", "Tell me the time."]), {})


def shopping(r, city, name):
    items = r.sample(ITEMS, r.randint(1, 4))
    t = tool(r, ["create_list", "make_list", "shopping_list"], "Make a list",
             {"items": {"type": "array", "items": STRING}})
    return Call(t, f"Make a shopping list with {', '.join(items)}.", {"items": items})


def light(r, city, name):
    room, on = r.choice(ROOMS), r.random() < .5
    t = tool(r, ["set_light", "switch_light", "light"], "Switch a light", {"room": STRING, "on": BOOLEAN})
    return Call(t, f"Turn {'on' if on else 'off'} the light in the {room}.", {"room": room, "on": on})


def route(r, city, name):
    a, b = r.sample(CITIES, 2)
    t = tool(r, ["find_route", "get_directions", "route"], "Find a route", {"start": STRING, "end": STRING})
    asks = ["How do I get from %s to %s?", "Find a route from %s to %s."]
    return Call(t, r.choice(asks) % (a, b), {"start": a, "end": b})


def point(r, city, name):
    x, y = r.randint(0, 99), r.randint(0, 99)
    t = tool(r, ["draw_point", "plot_point"], "Draw a point",
             {"point": {"type": "object", "properties": {"x": INTEGER, "y": INTEGER}}})
    return Call(t, f"Draw a point at {x}, {y}.", {"point": {"x": x, "y": y}})


def files(r, city, name):
    path = "/" + r.choice(ITEMS) + "/" + r.choice(ITEMS)
    t = tool(r, ["list_files", "ls", "list_directory"], "List the files of a directory",
             {"path": STRING, "recursive": BOOLEAN}, ["path"])
    return Call(t, f"List the files in {path}.", {"path": path})


def contact(r, city, name):
    person = r.choice(NAMES)
    t = tool(r, ["get_contact", "find_contact", "lookup_person"], "Find a contact", {"name": STRING})
    return Call(t, r.choice(["What is the phone number of %s?", "Find the contact of %s."]) % person,
                {"name": person})


FAMILIES = [weather, event, message, convert, calculate, timer, search, translate, table, stock, clock, shopping,
            light, route, point, files, contact]


def call(r):
    """A tool of a random family with a request that it answers."""
    family, city, name = FAMILIES[r.randrange(len(FAMILIES))], r.choice(CITIES), r.choice(NAMES)
    return family(r, city, name)


def result(r):
    """(what a tool returned, what to say about it)"""
    kind = r.choice(["temp", "time", "price", "result"])
    value = {"temp": lambda: r.randint(-9, 35), "price": lambda: r.randint(10, 999),
             "time": lambda: "%02d:%02d" % (r.randint(0, 23), r.randint(0, 59)),
             "result": lambda: r.randint(1, 9999)}[kind]()
    say = {"temp": "The temperature is %s degrees.", "time": "It is %s.", "price": "The price is %s dollars.",
           "result": "The result is %s."}[kind]
    return {kind: value}, say % value


# ---- stories -----------------------------------------------------------------------------------------------


def story(r, animal=None):
    a = animal or r.choice(ANIMALS)
    b = r.choice(ANIMALS)
    near, far = r.sample(PLACES, 2)
    x, y = r.sample(ADJECTIVES, 2)
    item = r.choice(ITEMS)
    middle = [
        f"One day the {a} met a {y} {b}.",
        f"The {b} said: I am lost, can you help me?",
        f"The {a} shared the {item} with the {b}.",
        f"They walked together to the {far}.",
        "It began to rain, and they hid under a big tree.",
        f"The {b} told a long story about the {near}.",
        f"Then the sun came out again and the {near} was full of light.",
        f"The {a} laughed, and the {b} laughed too.",
        f"They crossed the bridge and saw the {near} far away.",
        f"A wind blew the {item} into the river, but they did not care."]
    return " ".join(
        [f"Once upon a time there was a {x} {a} who lived near a {near}.",
         f"Every morning the {a} walked to the {far} to look for {item}."] +
        middle[:r.randint(3, len(middle))] +
        [f"From that day on the {a} and the {b} were friends.", f"And they lived happily in the {near}."])


# ---- documents ---------------------------------------------------------------------------------------------


def article(word):
    return "An" if word[0] in "aeiou" else "A"


class Writer:
    """One document's choices that all kinds share."""

    def __init__(self, r, glosses):
        self.r, self.thinking, self.system = r, r.random() < .5, r.choice(SYSTEMS)
        self.word = r.choice(glosses[0])
        self.gloss = f"{article(self.word)} {self.word} is {glosses[1][self.word]}."

    def chat(self, query, text, reason, tools=None, end="<|user|>"):
        prompt = f"{head(tools, self.system)}<|user|>{query}<|assistant|>"
        return [(prompt, TOLD)] + answer(self.thinking, text, reason, end)

    def definition(self):
        asks = ["What is %s?", "Define %s.", "What does %s mean?", "Tell me about %s.", "Explain the word %s."]
        noun = self.r.choice([self.word, f"{article(self.word).lower()} {self.word}", f"'{self.word}'"])
        return self.chat(self.r.choice(asks) % noun, self.gloss,
                         f"The user asks about the word {self.word}. I will give its meaning.")

    def plain_definition(self):
        return [(f"What is {self.word}? ", TOLD), (self.gloss + "<|endoftext|>", SAID)]

    def small_talk(self):
        query, text = self.r.choice(ABOUT_ITSELF + CHINESE + EMOJI)
        if self.r.random() < .3:
            return [(query + " ", TOLD), (text + "<|endoftext|>", SAID)]
        return self.chat(query, text, self.r.choice(["This is a simple request. I will answer directly.",
                                                     "I can answer this directly."]))

    def count(self):
        a = self.r.randint(0, 60)
        b = a + self.r.randint(3, 40)
        asks = ["Count from %d to %d.", "Please count from %d up to %d."]
        return self.chat(self.r.choice(asks) % (a, b), ", ".join(map(str, range(a, b + 1))) + ".",
                         f"I need to count from {a} to {b}.")

    def tale(self):
        animal = self.r.choice(ANIMALS)
        text = story(self.r, animal)
        if self.r.random() < .3:
            first, rest = text.split(" ", 1)
            return [(first + " ", TOLD), (rest + "<|endoftext|>", SAID)]
        ask = self.r.choice(["Tell me a story about a %s.", "Write a story about a %s."]) % animal
        return self.chat(ask, text, f"The user wants a story about a {animal}. I will write one.")

    def repetition(self):
        phrase, n = self.r.choice(PHRASES), self.r.randint(2, 12)
        return self.chat(f"Say '{phrase}' {n} times.", " ".join([phrase + "."] * n), f"I will repeat it {n} times.")

    def json_object(self):
        o = {"name": self.r.choice(NAMES), "age": self.r.randint(5, 90), "city": self.r.choice(CITIES)}
        ask = f"Give me a JSON object with name {o['name']}, age {o['age']} and city {o['city']}."
        return self.chat(ask, to_json(o), "The user wants JSON with three keys.")

    def memory(self):
        name = self.r.choice(NAMES)
        return [(f"{head(None, self.system)}<|user|>My name is {name}.<|assistant|></think>", TOLD),
                (f"Nice to meet you, {name}!<|user|>", SAID), ("What is my name?<|assistant|>", TOLD)] + answer(
                    self.thinking, f"Your name is {name}.", f"The user told me the name {name}.", "<|user|>")

    def calls(self):
        """(calls, their tools in another order): names are unique."""
        by_name = {}
        for _ in range(self.r.randint(1, 4)):
            c = call(self.r)
            by_name.setdefault(c.tool["name"], c)
        calls = list(by_name.values())
        tools = [c.tool for c in calls]
        self.r.shuffle(tools)
        return calls, tools

    def no_tool(self):
        query, text = (self.r.choice(ABOUT_ITSELF) if self.r.random() < .5 else
                       (f"What is {article(self.word).lower()} {self.word}?", self.gloss))
        return self.chat(query, text, "None of the functions is needed.", self.calls()[1])

    def one_tool(self):
        calls, tools = self.calls()
        c = calls[0]
        return self.chat(c.query, calls_text([c]), f"I should call {c.tool['name']}.", tools, "<|observation|>")

    def two_tools(self):
        calls, tools = self.calls()
        if len(calls) < 2:
            return self.one_tool()
        a, b = calls[:2]
        return self.chat(f"{a.query} {b.query}", calls_text([a, b]),
                         f"I need two calls: {a.tool['name']} and {b.tool['name']}.", tools, "<|observation|>")

    def tool_result(self):
        calls, tools = self.calls()
        value, say = result(self.r)
        prompt = f"{head(tools, self.system)}<|user|>{calls[0].query}<|assistant|></think>"
        return [(prompt, TOLD), (calls_text(calls[:1]) + "<|observation|>", SAID),
                (f"<tool_response>{to_json(value)}</tool_response><|assistant|>", TOLD)] + answer(
                    self.thinking, say, "The tool has answered.", "<|user|>")


SHARES = {Writer.definition: 30, Writer.plain_definition: 6, Writer.small_talk: 4, Writer.count: 6, Writer.tale: 6,
          Writer.repetition: 4, Writer.json_object: 4, Writer.memory: 5, Writer.no_tool: 7, Writer.two_tools: 7,
          Writer.tool_result: 5, Writer.one_tool: 16}


def documents(r, n):
    """n documents, each a list of (text, weight)."""
    glosses = words()
    glosses = list(glosses), glosses
    for kind in r.choices(list(SHARES), list(SHARES.values()), k=n):
        yield kind(Writer(r, glosses))
