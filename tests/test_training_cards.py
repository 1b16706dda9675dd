"""What a run publishes: words of its command line, and cards."""

import re
import shlex
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_videomamba.training.cards import (
    is_on_hub,
    public_command,
    public_name,
    public_word,
    seal,
    was_edited,
)


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("/home/alice/scripts/finetune.py", "finetune.py"),
        ("scripts/recipes/mine.yaml", "mine.yaml"),
        ("/home/alice/clips/", "clips"),
        ("--data=/home/alice/clips", "--data=clips"),
        ("../alice/clips", "clips"),
        ("~/clips", "clips"),
        ("~alice/clips", "clips"),
        (r"C:\Users\alice\clips", "clips"),
        (r"\\\\server\alice\clips", "clips"),
        ("alice@server:/home/alice/clips", "clips"),
        ("file:///home/alice/clips", "clips"),
        ("file:/home/alice/clips", "clips"),
        ("/home/alice", "***"),
        ("--data=/home/alice/", "--data=***"),
        ("--data=/nfs/home/alice/", "--data=***"),
        ("/Users/alice//", "***"),
        ("C:\\Users\\alice\\", "***"),
        ("~alice", "***"),
        ("~alice/", "***"),
        ("~", "~"),
        ("alice@server:/home/alice", "***"),
        ("alice@server:~bob/", "***"),
        ("file:///home/alice/", "***"),
        ("file:/home/alice", "***"),
        ("https://host.org/a/clips.tar", "https://host.org"),
        ("https://hooks.host.org/T/B/secret", "https://hooks.host.org"),
        ("http://localhost:8080/clips.tar", "http://localhost:8080"),
        ("https://user:token@host.org/clips.tar", "https://host.org"),
        ("https://user%3Atoken%40host.org/clips.tar", "https://host.org"),
        ("https://host.org/clips.tar?X-Amz-Signature=ab&x=1", "https://host.org"),
        ("https://host.org/clips.tar%3Fsig%3Dab", "https://host.org"),
        ("https://host.org/clips.tar#token=ab", "https://host.org"),
        ("https://host.org/clips.tar;sig=ab", "https://host.org"),
        ("https://huggingface.co/datasets/org/name", "https://huggingface.co/datasets/org/name"),
        ("https://huggingface.co/datasets/org/name?token=ab", "https://huggingface.co/datasets/org/name"),
        ("https://huggingface.co.host.org/secret", "https://huggingface.co.host.org"),
        ("https://huggingface.co@host.org/secret", "https://host.org"),
        ("hf://datasets/org/name/clips", "hf://datasets/org/name/clips"),
        ("https://host.org/clips.tar?email=a@b.org", "https://***"),
        ("--data=https://user:token@host.org/clips", "--data=https://host.org"),
        ("s3://KEY:SE/CR+ET=@bucket/clips", "s3://bucket/clips"),
        ("s3://KEY:SE?CRET@bucket/clips", "s3://***"),
        ("s3://KEY:SECRET", "s3://***"),
        ("zip://clips::https://user:token@host.org/a.zip", "***"),
        ("pipe:curl -H 'Authorization: Bearer ab' https://host.org/a.tar", "***"),
        ("host.org/clips.tar?sig=ab", "clips.tar"),
        ("host.org/clips.tar?sig=a/b", "***"),
        ("hf_abcdefghijklmnopqrstuvwxyz", "***"),
        ("ghp_abcdefghijklmnopqrstuvwxyz0123456789", "***"),
        ("--data=gho_abc", "--data=***"),
        ("github_pat_11ABC_abcdefgh", "***"),
        ("clips_glpat-abc-def", "clips_***"),
        ("AKIAIOSFODNN7EXAMPLE", "***"),
        ("s3://bucket/ASIAIOSFODNN7EXAMPLE/clips", "s3://bucket/***/clips"),
        ("xoxb-123456789012-abcDEF", "***"),
        ("sk-proj-abcdefghijklmnop_qrstuvwxyz-0123456789", "***"),
        ("/clips/sk-abcdefghijklmnopqrstuvwxyz", "***"),
        ("sk-digits", "sk-digits"),
        ("task-of-moving-digits-with-captions", "task-of-moving-digits-with-captions"),
        ("my_hf_clips", "my_hf_clips"),
        ("--token=abc", "--token=***"),
        ("--hub-token=hf_abc", "--hub-token=***"),
        ("org/name", "org/name"),
        ("google-bert/bert-base-uncased", "google-bert/bert-base-uncased"),
        ("--tokenizer=google-bert/bert-base-uncased", "--tokenizer=google-bert/bert-base-uncased"),
        ("--learning-rate", "--learning-rate"),
        ("1e-4", "1e-4"),
        ("-0.5", "-0.5"),
        ("--learning_rate=1e-4", "--learning_rate=1e-4"),
        ("my clips (v2)", "my clips (v2)"),
        ("/home/alice/my clips", "my clips"),
        ("", ""),
    ],
)
def test_words_that_are_published(word, shown):
    assert public_word(word) == shown


SECRETS = st.text(string.ascii_letters + string.digits + "+/=_-.~!$&*(),;:%?#@ ", max_size=20).map(
    lambda text: f"Xq{text}Zj"  # what no rule makes by itself
)
PLAIN = st.text(string.ascii_lowercase + string.digits, min_size=1, max_size=8)
FORMS = [
    "/home/{0}/{1}",
    "../{0}/{1}",
    "~/{0}/{1}",
    "~{0}/{1}",
    "C:\\{0}\\{1}",
    "./{0}/{0}/{1}",
    "file:///home/{0}/{1}",
    "https://{0}:x@host/{1}",
    "https://user:{0}@host/{1}",
    "https://{0}@host/{1}",
    "https://host/{1}?X-Amz-Credential={0}&X-Amz-Signature={0}",
    "https://host/{1}?{0}",
    "https://host/{1}#{0}",
    "s3://{0}:{0}@bucket/{1}",
    "gs://{1}?token={0}",
    "pipe:curl -u {0} https://host/{1}",
    "zip://{1}::s3://KEY:{0}@bucket/{1}",
    "https://host/{0}",
    "https://host/s/{0}/{1}",
    "ftp://host/{0}",
]
# of which the secret is a name without slashes
HOMES = [
    "/home/{0}",
    "/home/{0}/",
    "/Users/{0}/",
    "C:\\Users\\{0}\\",
    "~{0}",
    "file:///home/{0}/",
    "user@host:/home/{0}",
]
TOKENS = ["hf_{0}", "ghp_{0}", "github_pat_{0}", "xoxp-{0}", "sk-0123456789abcdefgh{0}", "/home/alice/ghp_{0}"]


def parts(secret):
    """The runs of three and more letters and digits of a secret."""
    return re.findall(r"[A-Za-z0-9]{3,}", secret)


@settings(deadline=None)
@given(
    st.sampled_from([*FORMS, *HOMES, *TOKENS]), SECRETS, PLAIN, st.sampled_from(["{}", "--data={}", "--more-data={}"])
)
def test_no_form_of_a_secret_is_published(form, secret, name, option):
    if form in TOKENS:
        secret = re.sub(r"\W", "", secret)
    elif form in HOMES:
        secret = re.sub(r"[/\\%]", "", secret)
    elif form.startswith(("/", ".", "~", "C")):  # a folder
        secret = re.sub(r"[/\\\\]", "", secret)
    word = option.format(form.format(secret, name))
    text = public_command(["finetune.py", "--data", word])
    for part in parts(secret):
        assert part not in text.replace(name, ""), (word, text)
    assert shlex.split(text)[:2] == ["finetune.py", "--data"]


@pytest.mark.parametrize("word", ["{0}", "{0}/", "../../alice", "--data={0}/", "server:{0}", "file://{0}"])
def test_the_name_of_the_user_is_not_published_wherever_homes_are(word, tmp_path, monkeypatch):
    home = tmp_path / "alice"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    assert public_word(word.format(home)) in ("***", "--data=***")
    assert public_word(str(home / "clips")) == "clips" and public_word("") == ""


def test_names_of_data_are_published_without_where_they_are():
    assert public_name("/home/alice/clips") == public_name("alice/clips") == "clips"
    assert public_name("https://user:token@host.org/clips.tar?sig=ab") == "host.org"
    assert public_name("https://huggingface.co/datasets/org/name") == "name"


def test_what_is_here_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_on_hub("alice/clips") and public_word("alice/clips") == "alice/clips"
    (tmp_path / "alice" / "clips").mkdir(parents=True)
    assert not is_on_hub("alice/clips") and public_word("alice/clips") == "clips"
    assert not is_on_hub("../clips") and not is_on_hub("/home/alice") and not is_on_hub("a/b/c")


# Cards


def test_an_edit_breaks_the_seal():
    sealed = seal("---\nlicense: mit\n---\n# X\n")
    assert sealed.startswith("---\nlicense: mit\n---\n# X\n") and seal(sealed) == sealed
    assert not was_edited(sealed, "another text") and not was_edited(sealed.replace("\n", "\r\n"), "another text")
    edits = [
        sealed.replace("X", "Y"),
        sealed + "more",
        "more" + sealed,
        sealed.replace("<!--", "Mine.\n<!--"),
        "---\nlicense: mit\n---\n# X\n",
        "",
    ]
    for edited in edits:
        assert was_edited(edited, "another text"), edited
        assert not was_edited(edited, edited) and not was_edited(edited, seal(edited))
