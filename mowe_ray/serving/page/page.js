"use strict";
(() => {
  const $ = id => document.getElementById(id);
  const COLOURS = ["--c0", "--c1", "--c2", "--c3", "--c4", "--c5", "--c6"];
  // One hue: the others belong to encoders.
  const PARTS = [["decode", "--pale"], ["queue", "--muted"], ["encoders", "--accent"], ["generation", "--strong"]];
  const PHRASES = ["Write down what is said.", "What emotion does the speaker have?", "Describe the sound."];
  const HEIGHT = 128, WINDOW = 512;
  const colour = name => `var(${name})`;
  let models = [], clip = null, running = [], recorder = null, token = sessionStorage.getItem("token") || "";

  const element = (name, className, text) => {
    const made = document.createElement(name);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const problem = text => { $("problem").textContent = text; $("problem").hidden = !text; };
  const headers = more => ({ ...more, ...(token ? { Authorization: `Bearer ${token}` } : {}) });
  const failure = async response => {
    const body = await response.json().catch(() => null);
    return new Error(body?.error?.message ?? `the server answered ${response.status}`);
  };

  // ---- the recording ----

  const toBase64 = blob => new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });

  const take = async (blob, name) => {
    problem("");
    stopPlaying();
    let sound = null;
    try {
      sound = await new OfflineAudioContext(1, 16000, 16000).decodeAudioData(await blob.arrayBuffer());
    } catch {
      // The server reads more formats than the browser does.
    }
    clip = { data: await toBase64(blob), seconds: sound ? sound.duration : null, sound, name };
    URL.revokeObjectURL($("audio").src);
    $("audio").src = URL.createObjectURL(blob);
    $("clip").textContent = clip.seconds === null ? name : `${name} · ${clip.seconds.toFixed(2)} s`;
    $("heard").hidden = false;
    for (const part of ["spectrogram", "ticks", "cursor"]) $(part).hidden = !sound;
    $("play").disabled = !sound;
    if (sound) draw();
  };

  const stopPlaying = () => { $("audio").pause(); $("play").textContent = "Play"; $("cursor").style.opacity = 0; };

  // Power of a window's frequencies, by the fast Fourier transform.
  const powers = (real, imaginary) => {
    const size = real.length;
    for (let i = 1, j = 0; i < size; i++) {
      let bit = size >> 1;
      for (; j & bit; bit >>= 1) j ^= bit;
      j ^= bit;
      if (i < j) [real[i], real[j]] = [real[j], real[i]];
    }
    for (let length = 2; length <= size; length <<= 1) {
      for (let start = 0; start < size; start += length) {
        for (let k = 0; k < length / 2; k++) {
          const angle = -2 * Math.PI * k / length, a = start + k, b = a + length / 2;
          const re = real[b] * Math.cos(angle) - imaginary[b] * Math.sin(angle);
          const im = real[b] * Math.sin(angle) + imaginary[b] * Math.cos(angle);
          [real[b], imaginary[b]] = [real[a] - re, imaginary[a] - im];
          [real[a], imaginary[a]] = [real[a] + re, imaginary[a] + im];
        }
      }
    }
    return real.subarray(0, size / 2).map((re, i) => re * re + imaginary[i] * imaginary[i]);
  };

  const shades = () => {
    const probe = element("canvas").getContext("2d");
    const style = getComputedStyle(document.documentElement);
    return ["--wash", "--pale", "--accent", "--strong"].map(name => {
      probe.fillStyle = style.getPropertyValue(name).trim();
      return [1, 3, 5].map(at => parseInt(probe.fillStyle.slice(at, at + 2), 16));
    });
  };

  const draw = () => {
    const canvas = $("spectrogram"), samples = clip.sound.getChannelData(0);
    const width = Math.max(64, Math.min(700, Math.floor(samples.length / 64)));
    [canvas.width, canvas.height] = [width, HEIGHT];
    const context = canvas.getContext("2d"), image = context.createImageData(width, HEIGHT), stops = shades();
    const levels = [];
    for (let x = 0; x < width; x++) {
      const start = Math.round(x / width * Math.max(0, samples.length - WINDOW));
      const real = Float32Array.from({ length: WINDOW }, (_, i) =>
        (samples[start + i] ?? 0) * (0.5 - 0.5 * Math.cos(2 * Math.PI * i / WINDOW)));
      levels.push(powers(real, new Float32Array(WINDOW)).map(power => 10 * Math.log10(power + 1e-9)));
    }
    const top = levels.reduce((most, row) => Math.max(most, ...row), -90);
    for (let x = 0; x < width; x++) {
      for (let y = 0; y < HEIGHT; y++) {
        // Low frequencies are spread, as the ear spreads them.
        const bin = Math.min(WINDOW / 2 - 1, Math.floor(WINDOW / 2 * (Math.exp(2.6 * (1 - y / HEIGHT)) - 1) / (Math.exp(2.6) - 1)));
        const share = Math.max(0, Math.min(1, (levels[x][bin] - top + 55) / 55)) * (stops.length - 1);
        const from = Math.min(stops.length - 2, Math.floor(share)), part = share - from;
        for (let c = 0; c < 3; c++) {
          image.data[4 * (y * width + x) + c] = stops[from][c] * (1 - part) + stops[from + 1][c] * part;
        }
        image.data[4 * (y * width + x) + 3] = 255;
      }
    }
    context.putImageData(image, 0, 0);
    const seconds = clip.seconds, step = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60].find(s => seconds / s <= 7) ?? 300;
    const marks = [];
    for (let at = 0; at < seconds - step / 3; at += step) marks.push(at);
    $("ticks").replaceChildren(...[...marks, seconds].map(at => {
      const mark = element("span", "", at === seconds ? `${at.toFixed(2)} s` : `${+at.toFixed(1)}`);
      mark.style.left = `${100 * at / seconds}%`;
      return mark;
    }));
  };

  const follow = () => {
    const audio = $("audio"), at = clip ? audio.currentTime / clip.seconds : 0;
    $("cursor").style.left = `${100 * Math.min(1, at)}%`;
    $("cursor").style.opacity = audio.paused ? 0 : 1;
    if (!audio.paused) requestAnimationFrame(follow);
  };

  $("play").addEventListener("click", () => {
    if (!$("audio").paused) return stopPlaying();
    $("play").textContent = "Pause";
    $("audio").play().then(follow);
  });
  $("audio").addEventListener("ended", stopPlaying);
  $("spectrogram").addEventListener("click", event => {
    $("audio").currentTime = event.offsetX / $("spectrogram").clientWidth * clip.seconds;
  });
  $("clear").addEventListener("click", () => { stopPlaying(); clip = null; $("heard").hidden = true; $("file").value = ""; $("file").focus(); });
  $("file").addEventListener("change", () => { const [file] = $("file").files; if (file) take(file, file.name); });
  for (const name of ["dragover", "dragleave", "drop"]) addEventListener(name, event => {
    event.preventDefault();
    $("drop").classList.toggle("over", name === "dragover");
    const [file] = name === "drop" ? event.dataTransfer.files : [];
    if (file) take(file, file.name);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { if (clip?.sound) draw(); });

  $("record").addEventListener("click", async () => {
    if (recorder) return recorder.stop();
    let stream;
    try {
      stream = await navigator.mediaDevices.getUserMedia({ audio: true });
    } catch (error) {
      return problem(`The microphone cannot be used: ${error.message}. Choose a file, or allow it in the browser.`);
    }
    const parts = [];
    recorder = new MediaRecorder(stream);
    recorder.addEventListener("dataavailable", event => parts.push(event.data));
    recorder.addEventListener("stop", () => {
      for (const track of stream.getTracks()) track.stop();
      const blob = new Blob(parts, { type: recorder.mimeType });
      recorder = null;
      $("record").setAttribute("aria-pressed", "false");
      $("record").lastChild.textContent = "Record";
      take(blob, "recording");
    });
    recorder.start();
    $("record").setAttribute("aria-pressed", "true");
    const began = Date.now();
    const tick = () => {
      if (!recorder) return;
      $("record").lastChild.textContent = `Stop · ${((Date.now() - began) / 1000).toFixed(0)} s`;
      setTimeout(tick, 250);
    };
    tick();
  });

  // ---- the question ----

  const membersOf = name => models.find(model => model.id === name)?.mowe.encoders ?? [];
  const kindOf = (name, member) => colour(COLOURS[membersOf(name).indexOf(member) % COLOURS.length]);

  const showEncoders = () => {
    const members = membersOf($("model").value);
    $("encoders").hidden = !members.length;
    for (const old of $("encoders").querySelectorAll("label")) old.remove();
    for (const member of members) {
      const label = element("label", "switch"), input = element("input");
      Object.assign(input, { type: "checkbox", checked: true, value: member });
      input.setAttribute("role", "switch");
      label.style.setProperty("--k", kindOf($("model").value, member));
      label.append(input, member);
      $("encoders").append(label);
    }
  };

  const leftOut = () => [...$("encoders").querySelectorAll("input:not(:checked)")].map(input => input.value);

  const ask = async (without, names) => {
    const text = $("text").value.trim();
    if (!text && !clip) return problem("Choose a recording, or write a question.");
    problem("");
    const content = [];
    if (clip) content.push({ type: "input_audio", input_audio: { data: clip.data, format: "wav" } });
    if (text) content.push({ type: "text", text });
    const pair = element("div", "pair");
    $("answers").prepend(pair);
    $("send").disabled = true;
    $("stop").hidden = false;
    await Promise.all(names.map(name => {
      const own = without.filter(member => membersOf(name).includes(member));
      return answer(pair, { model: name, messages: [{ role: "user", content }], stream: true, mowe: { without: own } }, text);
    }));
    $("send").disabled = running.length > 0;
    $("stop").hidden = !running.length;
  };

  const answer = async (pair, request, question) => {
    const card = $("answer").content.cloneNode(true).firstElementChild;
    const said = card.querySelector(".said"), control = new AbortController();
    if (clip?.example?.question === question) card.querySelector(".right").textContent = `The right answer: ${clip.example.answer}`;
    card.querySelector(".name").textContent = request.model;
    card.querySelector(".left-out").textContent = request.mowe.without.length ? `without ${request.mowe.without.join(", ")}` : "";
    card.querySelector(".asked").textContent = [clip?.name, question].filter(Boolean).join(" · ");
    said.classList.add("waiting");
    pair.append(card);
    pair.scrollIntoView({ block: "nearest" });
    running.push(control);
    try {
      const response = await fetch("v1/chat/completions", {
        method: "POST", signal: control.signal,
        headers: headers({ "Content-Type": "application/json" }), body: JSON.stringify(request),
      });
      if (!response.ok) throw await failure(response);
      for await (const event of eventsOf(response)) {
        if (event.error) throw new Error(event.error.message);
        said.textContent += event.choices[0]?.delta.content ?? "";
        if (event.mowe) report(card, request, event.mowe);
      }
      if (!said.textContent) { said.textContent = "no words"; said.classList.add("empty"); }
    } catch (error) {
      const stopped = error.name === "AbortError";
      if (!stopped) said.classList.add("failed");
      said.textContent = stopped ? `${said.textContent} (stopped)` : error.message;
    }
    said.classList.remove("waiting");
    running = running.filter(other => other !== control);
  };

  async function* eventsOf(response) {
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n\n");
      rest = lines.pop();
      for (const line of lines) if (line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }

  // ---- what the encoders did ----

  // Bold where that router chose the encoder.
  const bar = (share, chosen, kind, who) => {
    const made = element("span", "share");
    if (share === undefined) return made;
    const track = element("div", chosen ? "bar" : "bar idle"), fill = element("i"), percent = `${Math.round(100 * share)} %`;
    track.setAttribute("role", "img");
    track.setAttribute("aria-label", `${who}: ${percent}${chosen ? ", chosen" : ""}`);
    track.style.setProperty("--k", kind);
    fill.style.width = `${100 * share}%`;
    track.append(fill);
    made.append(track, element("span", "", percent));
    return made;
  };

  const report = (card, request, mowe) => {
    const fired = card.querySelector(".fired");
    mowe.clips.forEach((heard, number) => {
      if (mowe.clips.length > 1) fired.append(element("p", "which", `clip ${number + 1}, ${heard.seconds.toFixed(2)} s`));
      const grid = element("div", "encoders"), members = membersOf(request.model);
      if (!members.length) return;
      grid.append(element("span", "top", "encoder"), element("span", "top", "for every clip"), element("span", "top", "for this clip"), element("span", "top less", ""));
      for (const member of members) {
        const ran = heard.ran.includes(member), kind = kindOf(request.model, member);
        const who = element("span", `who ${ran ? "ran" : "idle"}`);
        who.style.setProperty("--k", kind);
        who.append(element("i"), member);
        who.title = ran ? "ran" : "did not run";
        const shareBy = router => bar(heard[router]?.[member], heard.chosen[router]?.includes(member), kind, member);
        const again = element("button", "less", "without");
        Object.assign(again, { type: "button", title: `answer again without ${member}` });
        again.setAttribute("aria-label", again.title);
        again.disabled = request.mowe.without.includes(member);
        again.addEventListener("click", () => ask([...request.mowe.without, member], [request.model]));
        grid.append(who, shareBy("independent"), shareBy("dependent"), again);
      }
      fired.append(grid);
    });
    if (mowe.clips.length) {
      const share = mowe.gflops_dense ? ` of ${round(mowe.gflops_dense)} with all encoders` : "";
      const together = mowe.batch_size > 1 ? `, answered together with ${mowe.batch_size - 1} more` : "";
      card.querySelector(".spent").textContent = `${round(mowe.gflops)} GFLOPs spent on the audio${share}${together}.`;
    }
    const times = card.querySelector(".times"), key = card.querySelector(".key");
    for (const [part, kind] of PARTS) {
      const ms = mowe.milliseconds[part] ?? 0, piece = element("i"), told = element("span"), dot = element("i");
      piece.style.flexGrow = ms;
      for (const made of [piece, dot]) made.style.setProperty("--k", colour(kind));
      times.append(piece);
      told.append(dot, `${part} ${round(ms)} ms`);
      key.append(told);
    }
    times.setAttribute("aria-label", key.textContent);
    card.querySelector(".details").hidden = false;
  };

  const round = value => value >= 100 ? value.toFixed(0) : value >= 1 ? value.toFixed(1) : value.toFixed(3);

  // ---- the page ----

  const get = async path => {
    const response = await fetch(path, { headers: headers() });
    if (response.ok) return response;
    if (response.status === 401) { $("locked").hidden = false; $("token").focus(); }
    throw await failure(response);
  };

  const showExamples = found => {
    $("examples").hidden = !found.length;
    const phrases = [...new Set([...PHRASES, ...found.map(example => example.question)])].slice(0, 6);
    $("phrases").replaceChildren(...phrases.map(text => {
      const button = element("button", "", text);
      button.type = "button";
      button.addEventListener("click", () => { $("text").value = text; $("text").focus(); });
      return button;
    }));
    $("examples").querySelector("ul").replaceChildren(...found.map((example, number) => {
      const item = element("li"), button = element("button");
      button.type = "button";
      button.append(element("small", "", example.task), element("span", "", example.question), element("em", "", `“${example.answer}”`));
      button.addEventListener("click", async () => {
        try {
          await take(await (await get(`examples/${number}`)).blob(), example.id);
          clip.example = example;
          $("text").value = example.question;
        } catch (error) { problem(error.message); }
      });
      item.append(button);
      return item;
    }));
  };

  const open = async () => {
    try {
      models = (await (await get("v1/models")).json()).data;
      $("locked").hidden = true;
      $("ask").hidden = false;
      $("model").replaceChildren(...models.map(model => new Option(model.id, model.id)));
      $("other").replaceChildren(new Option("none", ""), ...models.map(model => new Option(model.id, model.id)));
      $("beside").hidden = models.length < 2;
      showEncoders();
      showExamples(await (await get("examples")).json());
      problem("");
    } catch (error) { problem(error.message); }
    document.body.dataset.ready = "yes";
  };

  $("locked").addEventListener("submit", event => {
    event.preventDefault();
    token = $("token").value.trim();
    sessionStorage.setItem("token", token);
    open();
  });
  $("model").addEventListener("change", showEncoders);
  $("question").addEventListener("submit", event => {
    event.preventDefault();
    if (!running.length) ask(leftOut(), [...new Set([$("model").value, $("other").value].filter(Boolean))]);
  });
  $("text").addEventListener("keydown", event => {
    if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); $("question").requestSubmit(); }
  });
  $("stop").addEventListener("click", () => running.forEach(control => control.abort()));
  open();
})();
