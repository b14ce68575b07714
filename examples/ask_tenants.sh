#!/usr/bin/env bash
# Ask every tenant of the demo's bundle two things, in one batch each: ask_tenants.sh BUNDLE
# The texts are ours, written for this demo.
set -euo pipefail
bundle=$1

ask() {
    tenant=$1 question=$2 first=$3 second=$4
    printf '\n%s: %s\n  1. %s\n  2. %s\n' "$tenant" "$question" "$first" "$second"
    iapt-export generate "$bundle" --tenant "$tenant" --max-new-tokens 8 \
        --prompt "$question

$first" --prompt "$question

$second" | sed '/^---$/d; s/^/  -> /'
}

ask movie-sentiment "Is this movie review positive or negative?" \
    "A tender, funny and beautifully acted film that stays with you for days." \
    "Two hours of noise, with a plot that even its makers seem to have forgotten."

ask sarcasm "Is this headline sarcastic? Answer yes or no." \
    "local man heroically replies to all" \
    "new museum of transport opens to visitors in june"

ask reuters-r8 "What is the topic of this news: acquisition, currency, earnings, grain, interest, oil, shipping, trade?" \
    "the company said it agreed to buy all outstanding shares of its rival for cash subject to regulatory approval" \
    "opec ministers meet to discuss output quotas as crude prices fall below the official selling price"
