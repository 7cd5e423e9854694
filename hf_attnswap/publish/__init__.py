"""From a saved conversion and its report.json to a repository on the Hub, with a card that says what was measured."""
