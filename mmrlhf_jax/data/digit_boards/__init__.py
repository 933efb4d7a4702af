"""The quickstart's world: boards of real handwritten digits, questions about them, answers of known quality.

`boards` draws them, `questions` asks and knows what is right, `answerers` say what careless people would, `measures`
count what is wrong in any text, `world` writes it all as files for launch/prepare.py. Nothing is judged.
"""
