"""report.html in headless Chromium: filters, keys, hostile texts, speed."""

import shutil

import paged
import pytest
import reported

from dpo_jax.report import report

pytestmark = pytest.mark.browser

FLAGS = (
  "--headless",
  "--no-sandbox",
  "--disable-gpu",
  "--no-first-run",
  "--disable-background-networking",
)
MANY = 5000
BASE, SFT, DPO = ((model, None, 1.0) for model in ("base", "SFT", "DPO"))
STEP = ("DPO", 50, 0.75)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
  # Needed by browser tests only.
  from selenium import webdriver
  from selenium.webdriver.chrome import service

  paths = [shutil.which(name) for name in ("chromium", "chromedriver")]
  if None in paths:
    pytest.fail("install Debian's chromium and chromium-driver")
  profile = tmp_path_factory.mktemp("profile")
  options = webdriver.ChromeOptions()
  options.binary_location = paths[0]
  for flag in (*FLAGS, f"--user-data-dir={profile}", "--window-size=1280,900"):
    options.add_argument(flag)
  options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
  driver = webdriver.Chrome(options, service.Service(paths[1]))
  yield driver
  driver.quit()


@pytest.fixture
def shown(browser, tmp_path):
  """Opens a page's text; the console must be empty in the end."""

  def show(text):
    path = tmp_path / "report.html"
    path.write_text(text, encoding="utf-8")
    browser.get(path.as_uri())
    return browser

  yield show
  assert browser.get_log("browser") == []


def prompt(name, responses, turns=1, subset=""):
  text = "\n\nAssistant: so".join([f"\n\nHuman: {name}"] * turns)
  return paged.prompt(
    name, f"{text}\n\nAssistant:", responses=responses, subset=subset
  )


def small():
  """Prompts of which each filter finds other ones."""
  won, lost = ["model", "model"], ["chosen", "chosen"]
  alpha = [
    paged.response(BASE, "no", lost),
    paged.response(SFT, "four", won),
    paged.response(DPO, "much more of the same", won),
    paged.response(STEP, "four", lost),
  ]
  beta = [paged.response(DPO, "five", ["model", "chosen"])]
  gamma = [paged.response(DPO, "fore", ["tie", "tie"])]
  delta = [paged.response(SFT, "", ["missing", "missing"])]
  return [
    prompt("alpha", alpha),
    prompt("beta", beta, 2, "helpful-base"),
    prompt("gamma", gamma, subset="one turn"),
    prompt("delta", delta, 3, "helpful-base"),
  ]


def ids(driver):
  return driver.execute_script(
    "return state.prompts.map((prompt) => prompt.id)"
  )


def choose(driver, name, value):
  driver.execute_script(
    "const c = document.getElementById(arguments[0]); c.value = arguments[1];"
    "if (c.value !== arguments[1]) throw new Error('no such choice');"
    "c.dispatchEvent(new Event('change'))",
    name,
    value,
  )


def press(driver, key, target="body"):
  driver.find_element("css selector", target).send_keys(key)


def current(driver):
  return driver.execute_script("return state.prompts[state.current]?.id")


def prefer(driver, value):
  feature = {"name": "prefers-color-scheme", "value": value}
  driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


def test_filters(shown):
  driver = shown(paged.render(small()))
  everything = ["alpha", "beta", "gamma", "delta"]
  assert ids(driver) == everything
  assert "4 of 4 prompts, 7 responses" in driver.page_source
  for name, value, expected in (
    ("outcome", "won", ["alpha"]),
    ("outcome", "split", ["beta"]),
    ("model", "SFT", ["alpha", "delta"]),
    ("step", "50", ["alpha"]),
    ("temperature", "0.75", ["alpha"]),
    ("length", "shorter", ["alpha", "delta"]),
    ("length", "alike", ["alpha", "beta", "gamma"]),
    ("length", "twice", ["alpha"]),
    ("subset", "one turn", ["alpha", "gamma"]),
    ("subset", "of helpful-base", ["beta", "delta"]),
    # A subset may be called like another choice.
    ("subset", "of one turn", ["gamma"]),
  ):
    choose(driver, name, value)
    assert ids(driver) == expected, (name, value)
    choose(driver, name, "")
  assert ids(driver) == everything
  # All filters must match one response: base won nowhere, others on alpha.
  choose(driver, "outcome", "won")
  choose(driver, "model", "base")
  assert ids(driver) == []
  assert "No prompt has such a response" in driver.page_source
  driver.find_element("id", "clear").click()
  assert ids(driver) == everything
  driver.find_element("id", "flagged").click()
  assert ids(driver) == ["alpha", "beta", "delta"]


def test_search_in_prompts_responses_and_replies(shown):
  driver = shown(paged.render(small()))
  field = driver.find_element("id", "search")
  for words, expected in (
    ("BETA", ["beta"]),
    ("same much", ["alpha"]),
    ("better", ["alpha", "beta", "gamma", "delta"]),
    ("nowhere", []),
  ):
    field.clear()
    field.send_keys(words)
    driver.execute_async_script("setTimeout(arguments[0], 200)")
    assert ids(driver) == expected, words


def test_a_response_is_shown_with_its_verdicts(shown):
  driver = shown(paged.render(small()))
  press(driver, "j")
  (card,) = driver.find_elements("css selector", "#detail .cards .card")
  assert card.text.split("\n") == [
    "DPO",
    "orders disagree",
    "five",
    "4 characters · 3 tokens · ended itself",
    "⚑ orders disagree",
    "the response wins · response shown first",
    "A is better.",
    "chosen wins · response shown second",
    "A is better.",
  ]
  turns = driver.find_elements("css selector", "#detail .turn")
  assert [turn.text.split("\n") for turn in turns] == [
    ["Human", "beta"],
    ["Assistant", "so"],
    ["Human", "beta"],
  ]


def test_models_are_side_by_side(shown):
  driver = shown(paged.render(small()))
  cards = driver.find_elements("css selector", "#detail .cards .card")
  places = [card.rect for card in cards]
  assert len({place["y"] for place in places[:3]}) == 1
  assert places[0]["x"] < places[1]["x"] < places[2]["x"]
  headings = driver.find_elements("css selector", "#detail h5")
  assert [heading.text for heading in headings] == [
    "T = 1",
    "T = 0.75, over training",
  ]


def test_keys(shown):
  driver = shown(paged.render(small()))
  names = {"a": "alpha", "b": "beta", "c": "gamma", "d": "delta"}
  for key, expected in zip("jjkGjgk", "bcbddaa"):
    press(driver, key)
    assert current(driver) == names[expected]
  press(driver, "\ue015", "#list")  # the key Down
  assert current(driver) == "beta"
  press(driver, "f")
  assert ids(driver) == ["alpha", "beta", "delta"]
  # The same prompt stays where it is still there.
  assert current(driver) == "beta"
  press(driver, "x")
  press(driver, "s")
  assert ids(driver) == ["beta", "delta"]
  assert "· helpful-base" in driver.find_element("id", "detail").text
  press(driver, "x")
  press(driver, "m")
  assert ids(driver) == ["alpha"]
  press(driver, "x")
  press(driver, "/")
  assert driver.switch_to.active_element.get_attribute("id") == "search"
  driver.switch_to.active_element.send_keys("j\ue00c")  # j, then Escape
  assert driver.switch_to.active_element.get_attribute("id") == "list"
  press(driver, "x")
  press(driver, "?")
  assert driver.find_element("id", "help").is_displayed()
  keys = driver.execute_script("return KEYS.map(([keys, text]) => text)")
  terms = driver.find_elements("css selector", "#help dd")
  assert [term.text for term in terms] == keys
  assert len(keys) == 14
  press(driver, "\ue00c", "#help button")
  assert not driver.find_element("id", "help").is_displayed()
  assert driver.find_element("css selector", ".hint").is_displayed()


def test_a_prompt_has_an_address(shown):
  driver = shown(paged.render(small()))
  address = driver.current_url
  driver.get("about:blank")
  driver.get(f"{address}#prompt=gamma")
  assert current(driver) == "gamma"


def test_hostile_texts_are_inert_and_visible(shown):
  prompts = [
    paged.prompt(
      text,
      chosen=text,
      responses=[paged.response(DPO, text, ["model"], reply=text)],
    )
    for text in paged.HOSTILE
  ]
  driver = shown(paged.render(prompts, title=paged.HOSTILE[0]))
  assert driver.title == paged.HOSTILE[0]
  for text in paged.HOSTILE:
    expected = text
    for character in "\u2028\u0085\x0b\x00\u202e\u200b":
      expected = expected.replace(character, f"U+{ord(character):04X}")
    boxes = driver.find_elements("css selector", "#detail .text")
    contents = [box.get_attribute("textContent") for box in boxes]
    assert contents == [expected] * 4
    assert not driver.find_elements("css selector", "#panes img, #panes script")
    press(driver, "j")
  assert driver.execute_script("return window.hit") is None


def test_a_direction_mark_stays_in_its_text(shown):
  rtl = "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd"
  responses = [
    paged.response(DPO, rtl, ["model"]),
    paged.response(SFT, "a", []),
  ]
  driver = shown(paged.render([prompt("x", responses)]))
  directions = driver.execute_script(
    "return [...document.querySelectorAll('#detail .cards .response')].map("
    "(e) => getComputedStyle(e).direction)"
  )
  assert directions == ["rtl", "ltr"]


def test_the_page_obeys_no_other_script(browser, tmp_path):
  text = paged.render(small())
  text = text.replace("</main>", "<script>window.hit = 1</script></main>")
  path = tmp_path / "changed.html"
  path.write_text(text, encoding="utf-8")
  browser.get(path.as_uri())
  assert browser.execute_script("return window.hit") is None
  (entry,) = browser.get_log("browser")
  assert "Content Security Policy" in entry["message"]


def test_five_thousand_prompts_stay_responsive(shown):
  text = "the quick brown fox jumps over a lazy dog " * 7
  cells = [(m, None, t) for t in (0.25, 1.0) for m in ("base", "SFT", "DPO")]
  split = ["model", "chosen"]
  responses = [paged.response(cell, text, split, reply=text) for cell in cells]
  prompts = [prompt(f"number {number}", responses) for number in range(MANY)]
  driver = shown(paged.render(prompts))
  assert len(ids(driver)) == MANY
  times = driver.execute_script(
    """
    const times = {};
    const set = (name, value) => { controls[name].value = value; refresh(); };
    for (const [name, work] of Object.entries({
      outcome: () => set("outcome", "split"),
      first_search: () => set("search", "lazy 4999"),
      search: () => set("search", "fox 49"),
      reset: reset,
      last: () => go(4999),
      scroll: () => { list.scrollTop = 100000; paint(); },
    })) {
      const begun = performance.now();
      work();
      document.body.offsetHeight;  // forces the layout
      times[name] = performance.now() - begun;
    }
    return times;
    """
  )
  # No visible delay on a busy machine; an idle one takes a third or less.
  limits = dict.fromkeys(times, 300) | {"first_search": 1000}
  assert all(times[name] < limits[name] for name in times), times
  drawn = driver.find_elements("css selector", "#rows .row")
  assert 8 <= len(drawn) <= 40


def test_a_phone_needs_no_sideways_scroll(browser, tmp_path):
  reported.make_run(tmp_path, text=" " + "long" * 300)
  text = report.compose(reported.SETTINGS, tmp_path).texts["report.html"]
  path = tmp_path / "report.html"
  path.write_text(text, encoding="utf-8")
  size = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
  browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
  browser.get(path.as_uri())
  width, inner = browser.execute_script(
    "return [document.documentElement.scrollWidth, innerWidth]"
  )
  assert (width, inner) == (360, 360)
  # A tap on a prompt scrolls to its responses.
  browser.execute_script(
    "document.documentElement.style.scrollBehavior = 'auto';"
    "list.scrollIntoView()"
  )
  browser.find_element("id", "row-2").click()
  browser.execute_async_script("setTimeout(arguments[0], 1000)")
  top = browser.execute_script(
    "return document.getElementById('detail').getBoundingClientRect().top"
  )
  assert 0 <= top < 200
  browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
  browser.get_log("browser")  # images are not inserted


def test_the_page_and_its_figures_follow_the_theme(browser, tmp_path_factory):
  path = reported.written(tmp_path_factory) / "report.html"

  def dark():
    """Whether the paper and each image are dark; all must be decoded."""
    return browser.execute_async_script(
      """
      const done = arguments[0], images = [...document.images];
      const paper = getComputedStyle(document.body).backgroundColor;
      requestAnimationFrame(() => setTimeout(() =>
        Promise.all(images.map((image) => image.decode())).then(() => done(
          [paper === "rgb(23, 22, 20)", ...images.map((image) =>
            image.currentSrc ===
            image.parentElement.querySelector("source").srcset)])), 50));
      """
    )

  prefer(browser, "dark")
  browser.get(path.as_uri())
  assert dark() == [True] * 3
  press(browser, "t")
  assert dark() == [False] * 3
  prefer(browser, "light")
  assert dark() == [False] * 3
  browser.find_element("id", "theme").click()
  assert dark() == [True] * 3
  browser.refresh()
  assert dark() == [False] * 3
  assert browser.get_log("browser") == []
