"""Score, promote, import, reproduce and use trained models."""

WEIGHTS_FILE = "what torch.save(model.state_dict(), FILE) writes"  # that `import_weights` reads
BUDGET = 10  # challengers of a champion, among which the level of the test is shared
