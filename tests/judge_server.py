"""The package's fake judge server under the names that the tests use."""

from dpo_jax.judging import fake_answers, fake_server

Answer = fake_answers.Answer
Request = fake_answers.Request
Rule = fake_answers.Rule
Server = fake_server.Server
fails = fake_answers.fails
prefer_longer = fake_answers.prefer_longer
says = fake_answers.says
