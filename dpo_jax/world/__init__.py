"""Of the embedded world: facts, questions, answers and claims about them."""
