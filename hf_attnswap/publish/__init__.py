"""Publish a saved conversion and its report.json on the Hub, with a card that says what was measured."""
