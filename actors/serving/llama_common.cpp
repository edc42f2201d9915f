// A C interface to llama.cpp's own chat code (common/), which has none. JSON goes in and out; see llama_common.py.
//
// Every function that returns a char * gives memory of its own, to be freed with arriero_free. No exception leaves
// this file: what went wrong is told as {"error": "..."}.

#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>

#include "chat.h"
#include "json-schema-to-grammar.h"
#include "log.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

using json = common_json;

namespace {

char * told(const std::string & text) {
    char * copy = static_cast<char *>(std::malloc(text.size() + 1));
    if (copy != nullptr) {
        std::memcpy(copy, text.c_str(), text.size() + 1);
    }
    return copy;
}

char * attempt(const std::function<json()> & work) {
    std::string error;
    try {
        return told(work().dump());
    } catch (const std::bad_alloc &) {
        error = "out of memory";
    } catch (const std::exception & caught) {
        error = caught.what();
    } catch (...) {
        error = "an unknown error";
    }
    try {
        return told(json::object({{"error", error}}).dump());
    } catch (...) {  // the message itself may be no UTF-8
        return told("{\"error\": \"an error that cannot be told\"}");
    }
}

common_chat_templates_inputs inputs_of(const common_chat_templates * templates, const json & request) {
    common_chat_templates_inputs inputs;
    auto caps = common_chat_templates_get_caps(templates);
    inputs.messages = common_chat_msgs_parse_oaicompat(request.at("messages"));
    if (request.contains("tools")) {
        inputs.tools = common_chat_tools_parse_oaicompat(request.at("tools"));
    }
    if (request.contains("tool_choice")) {
        inputs.tool_choice = common_chat_tool_choice_parse_oaicompat(request.at("tool_choice").get<std::string>());
    }
    inputs.parallel_tool_calls = request.contains("parallel_tool_calls")
        ? request.at("parallel_tool_calls").get<bool>()
        : caps["supports_parallel_tool_calls"];
    if (request.contains("json_schema")) {
        inputs.json_schema = request.at("json_schema").dump();
    }
    if (request.contains("continue_final_message")) {
        inputs.continue_final_message = common_chat_continuation_parse(request.at("continue_final_message"));
        inputs.add_generation_prompt = inputs.continue_final_message == COMMON_CHAT_CONTINUATION_NONE;
    }
    inputs.reasoning_format = common_reasoning_format_from_name(request.at("reasoning_format").get<std::string>());
    inputs.enable_thinking = request.at("enable_thinking").get<bool>();
    for (const auto & item : request.at("chat_template_kwargs").items()) {
        inputs.chat_template_kwargs[item.key()] = item.value().dump();
    }
    return inputs;
}

struct Parser {
    common_chat_parser_params params;
    std::string               text;
    common_chat_msg           message;
};

json delta_of(const common_chat_msg_diff & diff) {
    json delta = json::object();
    if (!diff.reasoning_content_delta.empty()) {
        delta["reasoning_content"] = diff.reasoning_content_delta;
    }
    if (!diff.content_delta.empty()) {
        delta["content"] = diff.content_delta;
    }
    if (diff.tool_call_index != std::string::npos) {
        delta["index"] = diff.tool_call_index;
        delta["name"] = diff.tool_call_delta.name;
        delta["id"] = diff.tool_call_delta.id;
        delta["arguments"] = diff.tool_call_delta.arguments;
    }
    return delta;
}

}  // namespace

EXPORT void arriero_free(char * text) {
    std::free(text);
}

// The chat template of `model`, or `source` where that is not empty. Null, and `error`, when it cannot be read.
EXPORT void * arriero_templates(const llama_model * model, const char * source, char ** error) {
    common_log_set_verbosity_thold(-1);  // what is said there is said again in errors
    common_chat_templates * made = nullptr;
    *error = attempt([&]() {
        made = common_chat_templates_init(model, source).release();
        return json::object();
    });
    return made;
}

EXPORT void arriero_templates_free(void * templates) {
    common_chat_templates_free(static_cast<common_chat_templates *>(templates));
}

// A request for a chat, as the members of `inputs_of`, into a prompt and what belongs to it.
EXPORT char * arriero_render(void * made, const char * request) {
    return attempt([&]() {
        const auto * templates = static_cast<const common_chat_templates *>(made);
        auto params = common_chat_templates_apply(templates, inputs_of(templates, json::parse(request)));
        json triggers = json::array();
        for (const auto & trigger : params.grammar_triggers) {
            triggers.push_back(json::object({
                {"type", static_cast<int>(trigger.type)}, {"value", trigger.value}, {"token", trigger.token}}));
        }
        return json::object({
            {"prompt", params.prompt},
            {"grammar", params.grammar},
            {"grammar_lazy", params.grammar_lazy},
            {"grammar_triggers", triggers},
            {"preserved_tokens", params.preserved_tokens},
            {"additional_stops", params.additional_stops},
            {"generation_prompt", params.generation_prompt},
            {"format", static_cast<int>(params.format)},
            {"parser", params.parser},
            {"thinking_start_tag", params.thinking_start_tag},
            {"thinking_end_tags", params.thinking_end_tags},
        });
    });
}

// A parser of one answer. `syntax`: format, parser and generation_prompt as they were rendered; reasoning_format,
// parse_tool_calls and is_continuation as they were asked for. Null, and `error`, when it cannot be.
EXPORT void * arriero_parser(const char * syntax, char ** error) {
    auto parser = std::make_unique<Parser>();
    bool made = false;
    *error = attempt([&]() {
        auto told = json::parse(syntax);
        auto & params = parser->params;
        params.format = static_cast<common_chat_format>(told.at("format").get<int>());
        params.generation_prompt = told.at("generation_prompt").get<std::string>();
        params.reasoning_format =
            common_reasoning_format_from_name(told.at("reasoning_format").get<std::string>());
        params.parse_tool_calls = told.at("parse_tool_calls").get<bool>();
        params.is_continuation = told.at("is_continuation").get<bool>();
        auto source = told.at("parser").get<std::string>();
        if (!source.empty()) {
            params.parser.load(source);
        }
        made = true;
        return json::object();
    });
    return made ? parser.release() : nullptr;
}

EXPORT void arriero_parser_free(void * parser) {
    delete static_cast<Parser *>(parser);
}

// What `text` (`length` bytes), the next piece of the answer, adds to the message. `is_partial`: more may come.
EXPORT char * arriero_parse(void * made, const char * text, size_t length, bool is_partial) {
    return attempt([&]() {
        auto & parser = *static_cast<Parser *>(made);
        parser.text.append(text, length);
        auto message = common_chat_parse(parser.text, is_partial, parser.params);
        json deltas = json::array();
        if (!message.empty()) {
            for (const auto & diff : common_chat_msg_diff::compute_diffs(parser.message, message)) {
                deltas.push_back(delta_of(diff));
            }
            parser.message = std::move(message);
        }
        return json::object({{"deltas", deltas}});
    });
}

// A token that a grammar's sampler goes on with. False where it cannot: a token may complete the trigger of a lazy grammar
// and go on with text that the grammar does not allow. Then the sampler is of no use any more.
EXPORT bool arriero_take(llama_sampler * sampler, llama_token token) {
    try {
        llama_sampler_accept(sampler, token);
        return true;
    } catch (...) {
        return false;
    }
}

// The grammar (GBNF) of a JSON schema.
EXPORT char * arriero_grammar(const char * schema) {
    return attempt([&]() {
        return json::object({{"grammar", json_schema_to_grammar(json::parse(schema))}});
    });
}
